"""How fast and how big the block index is: `python -m loadtest.bench_index [--workers N]`.

The compiled table, plain masks, and `dynamo.llm.RadixTree` where that is installed (ai-dynamo-runtime), alternating in
one run: CPU seconds of the whole process, best of several rounds.
"""

import argparse
import gc
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from planes.wire.blocks import pack
from planes.wire.messages import BlocksRemoved, BlocksStored, KvEvents, WorkerId
from router.index.block_masks import BlockMasks
from router.index.index import BlockIndex, Blocks, fastest_blocks

_PROMPT = 128  # blocks
_ROUNDS = 5
_PAGE = 4096

_Names = npt.NDArray[np.uint64]


class Subject(Protocol):
    """An index that is measured. Events and prompts are made ready, as they would come in, before the clock runs."""

    def events(self, worker: int, parts: list[_Names], *, removes: bool) -> list[Any]: ...

    def apply(self, worker: int, event: Any) -> None: ...

    def prompt(self, names: _Names) -> Any: ...

    def match(self, prompt: Any) -> object: ...


class Headrace:
    """Ours, through the same door as in a gateway: publications with packed names."""

    def __init__(self, blocks: Callable[[], Blocks], num_workers: int, limit: int) -> None:
        self._index = BlockIndex(blocks())
        self._seqs = [0] * num_workers
        for worker in range(num_workers):
            self._index.add(WorkerId(f"w{worker}"), 1, limit)

    def events(self, worker: int, parts: list[_Names], *, removes: bool) -> list[Any]:
        kind, first = BlocksRemoved if removes else BlocksStored, self._seqs[worker] + 1
        self._seqs[worker] += len(parts)
        return [KvEvents(WorkerId(f"w{worker}"), 1, seq, [kind(pack(part))]) for seq, part in enumerate(parts, first)]

    def apply(self, worker: int, event: Any) -> None:
        del worker
        self._index.apply(event)

    def prompt(self, names: _Names) -> Any:
        return names

    def match(self, prompt: Any) -> object:
        return self._index.match(prompt)


class Dynamo:
    """`RadixTree`: takes JSON events, answers lists of numbers; works in a thread of its own."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    def events(self, worker: int, parts: list[_Names], *, removes: bool) -> list[Any]:
        del worker
        return [msgspec.json.encode({"event_id": 0, "data": self._data(part, removes=removes)}) for part in parts]

    def _data(self, part: _Names, *, removes: bool) -> dict[str, Any]:
        if removes:
            return {"removed": {"block_hashes": part.tolist()}}
        blocks = [{"block_hash": name, "tokens_hash": name} for name in part.tolist()]
        return {"stored": {"parent_hash": None, "blocks": blocks}}

    def apply(self, worker: int, event: Any) -> None:
        self._tree.apply_event(worker, event)

    def prompt(self, names: _Names) -> Any:
        return names.tolist()

    def match(self, prompt: Any) -> object:
        return self._tree.find_matches(prompt).scores


def makers() -> dict[str, Callable[[int, int], Subject]]:
    """What there is to measure: from a number of workers and the most blocks of one to an empty index."""
    made: dict[str, Callable[[int, int], Subject]] = {"plain masks": partial(Headrace, BlockMasks)}
    _, why_not = fastest_blocks()
    if not why_not:
        made["compiled"] = partial(Headrace, lambda: fastest_blocks()[0])
    try:
        from dynamo.llm import RadixTree  # type: ignore[import-not-found] # noqa: PLC0415 - optional
    except ImportError:
        return made
    return made | {"RadixTree": lambda _workers, _limit: Dynamo(RadixTree())}


def _cpu_s(work: Callable[[], object]) -> float:
    gc.collect()
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _names(rng: np.random.Generator, count: int) -> _Names:
    return rng.integers(0, 2**64, size=count, dtype=np.uint64)


def _apply_all(subject: Subject, worker: int, parts: list[_Names], *, removes: bool = False) -> float:
    events, last = subject.events(worker, parts, removes=removes), subject.prompt(parts[-1][:1])

    def apply() -> None:
        for event in events:
            subject.apply(worker, event)
        subject.match(last)  # where another thread does the work, it is done now

    return _cpu_s(apply)


def _parts(blocks: int, size: int) -> list[_Names]:
    names = _names(np.random.default_rng(0), blocks)
    return [names[start : start + size] for start in range(0, blocks, size)]


def apply_rates(subject: Subject, blocks: int, size: int) -> dict[str, float]:
    """Million blocks a second: new to everybody, held by another worker already, removed."""
    parts = _parts(blocks, size)
    seconds = {
        "new": _apply_all(subject, 0, parts),
        "shared": _apply_all(subject, 1, parts),
        "removed": _apply_all(subject, 0, parts, removes=True),
    }
    return {what: blocks / taken / 1e6 for what, taken in seconds.items()}


def bytes_a_block(name: str, blocks: int, size: int) -> float:
    """What a fresh process grows by."""
    subject = makers()[name](1, blocks)
    _apply_all(subject, 0, _parts(size, size))
    before = _resident()
    for number in range(1, blocks // size):
        part = _names(np.random.default_rng(number), size)
        subject.apply(0, subject.events(0, [part], removes=False)[0])
    subject.match(subject.prompt(part[:1]))
    return (_resident() - before) / (blocks - size)


def fill(subject: Subject, num_workers: int, blocks: int) -> dict[str, list[Any]]:
    """A fleet's blocks; prompts of 128 held by all, by all to different depths, by one, by nobody."""
    rng, dice = np.random.default_rng(1), random.Random(1)
    prompts = [_names(rng, _PROMPT) for _ in range(blocks // _PROMPT)]
    for worker in range(num_workers):
        parts = [prompt[: dice.randint(1, _PROMPT)] for prompt in prompts[1::8]] + prompts[::8]
        if worker == 0:
            parts += [prompt for number, prompt in enumerate(prompts) if number % 8 > 1]
        for event in subject.events(worker, parts, removes=False):
            subject.apply(worker, event)
    foreign = [_names(rng, _PROMPT) for _ in range(200)]
    cases = {"all": prompts[::8], "depths": prompts[1::8], "one": prompts[2::8], "nobody": foreign}
    return {what: [subject.prompt(prompt) for prompt in some[:200]] for what, some in cases.items()}


def match_us(subject: Subject, cases: dict[str, list[Any]]) -> dict[str, float]:
    """Microseconds a match, of each kind."""
    return {
        what: _cpu_s(lambda some=some: [subject.match(prompt) for prompt in some]) / len(some) * 1e6  # type: ignore[misc]
        for what, some in cases.items()
    }


def _best(rounds: list[dict[str, float]], choose: Callable[[Iterable[float]], float]) -> str:
    return "  ".join(f"{what} {choose(each[what] for each in rounds):.1f}" for what in rounds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 200])
    parser.add_argument("--blocks", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=256, help="blocks per publication")
    args = parser.parse_args()
    made = makers()
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for _ in range(_ROUNDS):
        for name, make in made.items():
            rates[name].append(apply_rates(make(2, args.blocks), args.blocks, args.batch))
    print(f"M blocks/s, {args.blocks} blocks, {args.batch} a publication")
    for name, rounds in rates.items():
        print(f"  {name:10}  {_best(rounds, max)}")
    for num_workers in args.workers:
        filled = {name: make(num_workers, args.blocks) for name, make in made.items()}
        cases = {name: fill(subject, num_workers, args.blocks) for name, subject in filled.items()}
        times: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        for _ in range(_ROUNDS):
            for name, subject in filled.items():
                times[name].append(match_us(subject, cases[name]))
        print(f"us a match of {_PROMPT} blocks, by who holds them, {num_workers} workers")
        for name, rounds in times.items():
            print(f"  {name:10}  {_best(rounds, min)}")
    print("bytes a block")
    for name in made:
        with get_context("spawn").Pool(1) as child:
            print(f"  {name:10}  {child.apply(bytes_a_block, (name, args.blocks, args.batch)):.0f}")


if __name__ == "__main__":
    main()
