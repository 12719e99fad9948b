"""How fast and how big the block index is: `python -m loadtest.bench_index [--workers N]`.

CPU seconds of one core, best of several rounds. Printed beside `dynamo.llm.RadixTree` where that is installed.
"""

import argparse
import gc
import random
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from planes.blocks import pack
from planes.messages import BlocksRemoved, BlocksStored, KvEvents, WorkerId
from router.index import BlockIndex

_PROMPT = 128  # blocks
_ROUNDS = 5


def _cpu_s(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _names(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint64]:
    return rng.integers(0, 2**64, size=count, dtype=np.uint64)


def _batches(
    worker: WorkerId, names: npt.NDArray[np.uint64], size: int, *, removes: bool = False, first: int = 1
) -> list[KvEvents]:
    kind = BlocksRemoved if removes else BlocksStored
    parts = (names[start : start + size] for start in range(0, len(names), size))
    return [KvEvents(worker, 1, seq, [kind(pack(part))]) for seq, part in enumerate(parts, first)]


def _apply_all(index: BlockIndex, batches: list[KvEvents]) -> None:
    for batch in batches:
        index.apply(batch)


def bench_apply(num_workers: int, blocks: int, size: int) -> dict[str, float]:
    """Million blocks per second: stored new, stored where others hold them already, removed."""
    rng = np.random.default_rng(0)
    best = {"new": 0.0, "shared": 0.0, "removed": 0.0}
    for _ in range(_ROUNDS):
        index = BlockIndex()
        workers = [WorkerId(f"w{number}") for number in range(num_workers)]
        for worker in workers:
            index.add(worker, 1, blocks)
        names = _names(rng, blocks)
        count = len(_batches(workers[0], names, size))
        runs = {
            "new": _batches(workers[0], names, size),
            "shared": _batches(workers[1], names, size),
            "removed": _batches(workers[0], names, size, removes=True, first=count + 1),
        }
        for what, batches in runs.items():
            gc.collect()
            seconds = _cpu_s(lambda batches=batches, index=index: _apply_all(index, batches))  # type: ignore[misc]
            best[what] = max(best[what], blocks / seconds / 1e6)
    return best


def bench_match(num_workers: int, blocks: int) -> dict[str, float]:
    """Microseconds to match a prompt of 128 blocks, among `blocks` others: held by all, by some, by nobody."""
    rng, dice = np.random.default_rng(1), random.Random(1)
    index = BlockIndex()
    prompts = [_names(rng, _PROMPT) for _ in range(blocks // _PROMPT)]
    for number in range(num_workers):
        worker = WorkerId(f"w{number}")
        index.add(worker, 1, blocks)
        held = [prompt[: _PROMPT if dice.random() < 0.5 else dice.randrange(_PROMPT)] for prompt in prompts[::8]]
        held += [prompts[k] for k in range(1, len(prompts), 8)]
        if number == 0:
            held += prompts
        _apply_all(index, _batches(worker, np.concatenate(held), 512))
    foreign = [_names(rng, _PROMPT) for _ in range(200)]
    cases = {"one run": prompts[1::8][:200], "many runs": prompts[::8][:200], "nothing": foreign}
    return {
        what: min(_cpu_s(lambda some=some: [index.match(p) for p in some]) for _ in range(_ROUNDS)) / len(some) * 1e6  # type: ignore[misc]
        for what, some in cases.items()
    }


def bench_memory(blocks: int) -> float:
    """Bytes per block held."""
    names = _names(np.random.default_rng(2), blocks)
    batches = _batches(WorkerId("w"), names, 512)
    index = BlockIndex()
    index.add(WorkerId("w"), 1, blocks)
    tracemalloc.start()
    _apply_all(index, batches)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / blocks


def bench_radix_tree(blocks: int, size: int) -> str:
    """The same work for Dynamo's tree, as far as its Python binding allows."""
    try:
        from dynamo.llm import RadixTree  # noqa: PLC0415 - optional
    except ImportError:
        return "dynamo.llm.RadixTree: not installed (pip install ai-dynamo-runtime)"
    import msgspec  # noqa: PLC0415 - only here

    rng = np.random.default_rng(3)
    events = []
    parent = None
    for number in range(blocks // size):
        hashes = _names(rng, size).tolist()
        stored = {
            "parent_hash": parent,
            "blocks": [{"block_hash": name, "tokens_hash": name, "mm_extra_info": None} for name in hashes],
        }
        events.append(msgspec.json.encode({"event_id": number, "data": {"stored": stored}}))
    tree = RadixTree()
    seconds = _cpu_s(lambda: [tree.apply_event(0, event) for event in events])
    return f"dynamo.llm.RadixTree: {blocks / seconds / 1e6:.1f} M blocks/s stored, from JSON"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 200])
    parser.add_argument("--blocks", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=256, help="blocks per publication")
    args = parser.parse_args()
    for num_workers in args.workers:
        applied = bench_apply(num_workers, args.blocks, args.batch)
        matched = bench_match(num_workers, args.blocks)
        print(f"{num_workers} workers, {args.blocks} blocks, {args.batch} a publication")
        print("  M blocks/s   " + "  ".join(f"{what} {rate:.1f}" for what, rate in applied.items()))
        print("  us per match " + "  ".join(f"{what} {us:.1f}" for what, us in matched.items()))
    sizes = (args.blocks, args.blocks * 5)
    print("bytes a block  " + "  ".join(f"{size} blocks: {bench_memory(size):.0f}" for size in sizes))
    print(bench_radix_tree(args.blocks, args.batch))


if __name__ == "__main__":
    main()
