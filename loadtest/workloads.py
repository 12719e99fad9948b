"""What the simulator serves: traces in Mooncake's format and fully specified synthetic loads, all drawn from a seed.

A workload is a list of sessions. A session begins at a given instant; each of its turns follows the answer to the turn
before after a think time. A load of independent requests (open loop) has one turn per session.

Prompts have names of blocks but no tokens. A prompt is a path in a tree of segments (a system prompt, a document, a
question): the id of the segment in which a block ends tells, together with all ids before it, what the block holds. So
block names are `wire.blocks.name_blocks` over one id per block, and two prompts share names exactly as far as they
share segments. `hash_ids` of a trace are such ids already.
"""

import gzip
import itertools
import math
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np

from app.recording import TRACE_BLOCK_SIZE
from planes.wire.blocks import Hashes, name_blocks, root
from planes.wire.messages import EngineFacts
from planes.wire.unreadable import UNREADABLE

_P90: Final = 1.2816  # standard deviations above the median
_ROOT: Final = root("simulated")


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    think_s: seconds from the end of the session's last answer (or from the session's start) until it is sent.
    blocks: names of the full blocks of the prompt and, where a later turn continues it, of the answer.
    """

    think_s: float
    prompt_tokens: int
    completion_tokens: int
    blocks: Hashes


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that follow each other; `start_s` counts from the start of the run."""

    start_s: float
    turns: tuple[Turn, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions by start; all block names are for `block_size`.

    num_clients: a closed loop: so many clients begin together, and each takes the next session when it has ended one,
    whenever that should have started; None: sessions start when they say.
    """

    name: str
    block_size: int
    sessions: tuple[Session, ...]
    num_clients: int | None = None

    @property
    def num_requests(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    @property
    def longest_prompt_tokens(self) -> int:
        return max((turn.prompt_tokens for session in self.sessions for turn in session.turns), default=0)

    def scaled(self, rate: float) -> "Workload":
        """The same sessions, starting `rate` times as fast; think times stay."""
        if not rate > 0:
            raise ValueError(f"the rate scale is {rate}; it must be above 0")
        return replace(self, sessions=tuple(replace(each, start_s=each.start_s / rate) for each in self.sessions))

    def limited(self, num_sessions: int) -> "Workload":
        """The first `num_sessions` only."""
        return replace(self, sessions=self.sessions[:num_sessions])


def load(name: str, *, block_size: int, seed: int) -> Workload:
    """The workload called `name`: a synthetic one, else a trace by name or path.

    Raises:  FileNotFoundError if there is no such trace; ValueError if it does not fit `block_size` or is malformed.
    """
    if name in GENERATORS:
        return Workload(name, block_size, tuple(GENERATORS[name](block_size, random.Random(seed))))
    return read_trace(find_trace(name), block_size=block_size, seed=seed)


# --- traces ----------------------------------------------------------------------------------------------------------


def most_prompt_tokens(facts: EngineFacts) -> int:
    """Of a prompt that a worker with these facts computes: its decode leg brings one more, and one is generated."""
    return facts.context_length - 2


def check_fits(workload: Workload, facts: EngineFacts) -> None:
    """Raises:  ValueError for a prompt that is longer."""
    longest, most = workload.longest_prompt_tokens, most_prompt_tokens(facts)
    if longest > most:
        raise ValueError(
            f"--blocks is {facts.num_blocks} and --block-size {facts.block_size}: a worker takes at most {most} "
            f"tokens of prompt, and {workload.name} has one of {longest}"
        )


def find_trace(name: str) -> Path:
    """A path as it is, of a folder too; a name is looked for beside this file and in `$HEADRACE_TRACES`."""
    folders = [Path(__file__).parent / "traces"]
    if folder := os.environ.get("HEADRACE_TRACES"):
        folders.append(Path(folder))
    stems = [name, f"mooncake_{name}"]
    found = [
        path
        for folder, stem, ending in itertools.product(folders, stems, (".jsonl.gz", ".jsonl", ""))
        if (path := folder / f"{stem}{ending}").is_file()
    ]
    if name and Path(name).exists():
        return Path(name)
    if not found:
        synthetic = ", ".join(GENERATORS)
        raise FileNotFoundError(f"no trace {name!r} in {', '.join(map(str, folders))}; synthetic loads are {synthetic}")
    return found[0]


def read_trace(path: Path, *, block_size: int, seed: int) -> Workload:
    """A trace in Mooncake's format: a file, or a folder of them as a gateway records it (`--record`).

    Arrivals with one timestamp are spread uniformly until the next, at most over twice the trace's smallest step.
    A block smaller than the trace's gets the id of the trace's block around it, so `block_size` must divide 512.
    Raises:  ValueError that names the line; FileNotFoundError.
    """
    if TRACE_BLOCK_SIZE % block_size:
        raise ValueError(f"block size {block_size} does not divide the {TRACE_BLOCK_SIZE} tokens of a trace's block")
    records = [record for file in _files(path) for record in _records(file)]
    if not records:
        raise ValueError(f"{path} holds no request: a trace has one JSON object a line")
    records.sort(key=lambda record: record.timestamp)
    rng = random.Random(seed)
    batches = [list(batch) for _, batch in itertools.groupby(records, key=lambda record: record.timestamp)]
    instants = [batch[0].timestamp / 1000 for batch in batches]
    gaps = [later - sooner for sooner, later in itertools.pairwise(instants)]
    step = min(gaps, default=0.0)
    sessions = []
    for start, gap, batch in zip(instants, [*(min(gap, 2 * step) for gap in gaps), step], batches, strict=True):
        arrivals = sorted(start + rng.random() * gap for _ in batch)
        sessions += [
            Session(at - instants[0], (_trace_turn(record, block_size),))
            for at, record in zip(arrivals, batch, strict=True)
        ]
    return Workload(path.name.split(".")[0], block_size, tuple(sessions))


def _files(path: Path) -> list[Path]:
    """By name. Each process of a gateway records into a folder of its own."""
    return sorted(each for each in path.rglob("*.jsonl*") if each.is_file()) if path.is_dir() else [path]


def _records(path: Path) -> "Iterator[_Record]":
    text = path.read_bytes()
    if path.suffix == ".gz":
        try:
            text = gzip.decompress(text)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _record(line, f"{path}:{number}")


class _Record(msgspec.Struct):
    """A line of a trace. timestamp: milliseconds.  input_length, output_length: tokens.  hash_ids: one per 512."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=1)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]]


def _record(line: bytes, place: str) -> _Record:
    try:
        record = msgspec.json.decode(line, type=_Record)
    except UNREADABLE as exc:
        raise ValueError(f"{place}: {exc}") from exc
    needed = -(-record.input_length // TRACE_BLOCK_SIZE)
    if len(record.hash_ids) != needed:
        raise ValueError(
            f"{place}: {len(record.hash_ids)} hash_ids for {record.input_length} tokens; "
            f"there must be one per {TRACE_BLOCK_SIZE}, {needed}"
        )
    return record


def _trace_turn(record: _Record, block_size: int) -> Turn:
    ids = np.asarray(record.hash_ids, dtype=np.uint32)
    names = name_blocks(np.repeat(ids, TRACE_BLOCK_SIZE // block_size), 1, _ROOT)
    return Turn(0.0, record.input_length, record.output_length, names[: record.input_length // block_size])


# --- synthetic loads -------------------------------------------------------------------------------------------------


def segment_names(segments: Sequence[tuple[int, int]], block_size: int) -> Hashes:
    """Block names of a prompt made of `(segment id, tokens)`; an id must always follow the same ids."""
    ends = np.cumsum([tokens for _, tokens in segments])
    last_tokens = np.arange(1, ends[-1] // block_size + 1) * block_size
    ids = np.array([segment for segment, _ in segments], dtype=np.uint32)
    return name_blocks(ids[np.searchsorted(ends, last_tokens)], 1, _ROOT)


def poisson(rng: random.Random, duration_s: float, rate: Callable[[float], float], peak: float) -> Iterator[float]:
    """Instants of a Poisson process with the given rate (requests/s, at most `peak`), by thinning."""
    now = rng.expovariate(peak)
    while now < duration_s:
        if rng.random() * peak < rate(now):
            yield now
        now += rng.expovariate(peak)


def shared_prefix(block_size: int, rng: random.Random) -> Iterator[Session]:
    """llm-d's shared-prefix load: 150 groups of 5 prompts, 6000 tokens common to a group, 1200 of one's own, 1000 out.

    Poisson arrivals whose rate rises evenly from 3 to 60 requests/s over 100 s. The 750 prompts come round after
    round, shuffled for each.
    """
    groups, prompts, duration_s = 150, 5, 100.0
    turns = [
        Turn(0.0, 7200, 1000, segment_names([(group, 6000), (groups + group * prompts + own, 1200)], block_size))
        for group in range(groups)
        for own in range(prompts)
    ]
    deck: list[Turn] = []
    for at in poisson(rng, duration_s, lambda now: 3 + 57 * now / duration_s, 60):
        if not deck:
            deck = rng.sample(turns, len(turns))
        yield Session(at, (deck.pop(),))


def prefix_repetition(block_size: int, rng: random.Random) -> Iterator[Session]:
    """One of 100 prefixes of 512 tokens, then 128 tokens of one's own; 128 out; Poisson, 50 requests/s for 60 s."""
    prefixes = 100
    for number, at in enumerate(poisson(rng, 60.0, lambda _: 50, 50)):
        segments = [(rng.randrange(prefixes), 512), (prefixes + number, 128)]
        yield Session(at, (Turn(0.0, 640, 128, segment_names(segments, block_size)),))


def agentic(block_size: int, rng: random.Random) -> Iterator[Session]:
    """Agents: 20,000 tokens common to all, 10,000 of the session's own, 2048 more with every turn; 900 out; 30 turns.

    32 sessions start as a Poisson process, one per 4 s; a turn follows the last answer after a think time (a tool's
    run), exponential with mean 2 s. The prompt of a turn holds all earlier prompts and answers.
    """
    sessions, num_turns, start = 32, 30, 0.0
    ids = itertools.count(1)
    for _ in range(sessions):
        start += rng.expovariate(1 / 4)
        segments, turns = [(0, 20_000), (next(ids), 10_000)], []
        for number in range(num_turns):
            segments.append((next(ids), 2048))
            prompt_tokens = sum(tokens for _, tokens in segments)
            segments.append((next(ids), 900))
            think_s = rng.expovariate(1 / 2) if number else 0.0
            turns.append(Turn(think_s, prompt_tokens, 900, segment_names(segments, block_size)))
        yield Session(start, tuple(turns))


def uniform(block_size: int, rng: random.Random) -> Iterator[Session]:
    """Nothing shared: 64 to 8192 tokens in, 16 to 512 out, uniformly; Poisson, 8 requests/s for 120 s."""
    for number, at in enumerate(poisson(rng, 120.0, lambda _: 8, 8)):
        prompt_tokens, completion_tokens = rng.randint(64, 8192), rng.randint(16, 512)
        names = segment_names([(number, prompt_tokens)], block_size)
        yield Session(at, (Turn(0.0, prompt_tokens, completion_tokens, names),))


def tools(block_size: int, rng: random.Random) -> Iterator[Session]:
    """Agents with tools: one of 60 sets of tools in the prompt, few turns, short answers.

    1,000 to 8,000 tokens of tools, the k-th set 1/k as often as the first. A turn adds lognormal tokens (median 1,500,
    sigma 1, at most 30,000), 90 of answer (median, sigma 0.9). A session has 3 to 4 turns on average, geometric, at
    most 12, 5 s and more apart. 4 sessions/s for 120 s.
    """
    sizes = [rng.randint(1000, 8000) for _ in range(60)]
    ids = itertools.count(len(sizes))
    for at in poisson(rng, 120.0, lambda _: 4, 4):
        kind = zipf(rng, len(sizes), 1.0)
        segments, turns = [(kind, sizes[kind])], []
        for number in range(min(12, 1 + int(rng.expovariate(1 / 3)))):
            segments.append((next(ids), lognormal(rng, 1500, 1.0, 30_000)))
            prompt_tokens, answer = sum(tokens for _, tokens in segments), lognormal(rng, 90, 0.9, 2000)
            think_s = 5 + rng.expovariate(1 / 8) if number else 0.0
            turns.append(Turn(think_s, prompt_tokens, answer, segment_names(segments, block_size)))
            segments.append((next(ids), answer))
        yield Session(at, tuple(turns))


def documents(block_size: int, rng: random.Random) -> Iterator[Session]:
    """Questions about 400 documents: 2,000 to 20,000 tokens each, the k-th asked k^-0.9 as often as the first.

    Then 50 to 500 tokens of question; 250 out on average, exponential; Poisson, 8 requests/s for 180 s.
    """
    sizes = [rng.randint(2000, 20_000) for _ in range(400)]
    for number, at in enumerate(poisson(rng, 180.0, lambda _: 8, 8)):
        document = zipf(rng, len(sizes), 0.9)
        segments = [(document, sizes[document]), (len(sizes) + number, rng.randint(50, 500))]
        prompt_tokens = sum(tokens for _, tokens in segments)
        names = segment_names(segments, block_size)
        yield Session(at, (Turn(0.0, prompt_tokens, 1 + int(rng.expovariate(1 / 250)), names),))


def bursts(block_size: int, rng: random.Random) -> Iterator[Session]:
    """Chats that come in waves: 14 requests/s for 15 s of every minute, else 2.5, for 300 s.

    1,024 tokens common to all, lognormal tokens of one's own (median 1,800, sigma 1.3, at most 60,000); 200 out on
    average, exponential.
    """
    for number, at in enumerate(poisson(rng, 300.0, lambda now: 14 if now % 60 < 15 else 2.5, 14)):
        own = lognormal(rng, 1800, 1.3, 60_000)
        names = segment_names([(0, 1024), (1 + number, own)], block_size)
        yield Session(at, (Turn(0.0, 1024 + own, 1 + int(rng.expovariate(1 / 200)), names),))


def code(block_size: int, rng: random.Random) -> Iterator[Session]:
    """Code completion: long prompts, next to no answer, nothing shared; 1,500 requests that come in bursts.

    Lognormal prompts (median 1,450, 5,100 at p90, at most 7,400) and answers (median 13, 54 at p90, at most 2,000);
    2.2 requests/s with a coefficient of variation of 14: a gap in 133 is a pause, the others are seven times as short
    as the mean. What a public trace of a completion service shows, and as hard on 8 prefill and 4 decode workers.
    """
    count = 1500
    gaps = list(bursty_gaps(rng, count, cv=14.0, pauses=1 / 133))
    ends = np.cumsum(gaps) * count / 2.2 / sum(gaps)
    for number, at in enumerate(ends.tolist()):
        prompt_tokens = lognormal(rng, 1450, math.log(5100 / 1450) / _P90, 7400)
        answer = lognormal(rng, 13, math.log(54 / 13) / _P90, 2000)
        yield Session(at, (Turn(0.0, prompt_tokens, answer, segment_names([(number, prompt_tokens)], block_size)),))


def flood(block_size: int, rng: random.Random) -> Iterator[Session]:
    """Three tenants ask steadily, 1 request/s each; a fourth sends 30 requests/s from the 20th to the 40th second.

    1,000 to 3,000 tokens in, uniformly, nothing shared; 50 out on average, exponential; 120 s.
    """

    def asks(tenant: str, rate: float, begin: float, end: float) -> Iterator[tuple[float, str]]:
        return ((begin + at, tenant) for at in poisson(rng, end - begin, lambda _: rate, rate))

    steady = [each for tenant in ("a", "b", "c") for each in asks(tenant, 1, 0, 120)]
    arrivals = [*steady, *asks("loud", 30, 20, 40)]
    for number, (at, tenant) in enumerate(sorted(arrivals)):
        prompt_tokens = rng.randint(1000, 3000)
        names = segment_names([(number, prompt_tokens)], block_size)
        yield Session(at, (Turn(0.0, prompt_tokens, 1 + int(rng.expovariate(1 / 50)), names),), tenant)


def bursty_gaps(rng: random.Random, count: int, *, cv: float, pauses: float) -> Iterator[float]:
    """Gaps between arrivals, 1 on average, with coefficient of variation `cv`: exponential ones of two kinds, a share
    `pauses` of them long (a hyperexponential distribution).
    """
    spread = math.sqrt((cv * cv - 1) / 2)  # of the two kinds' means
    short = 1 - spread * math.sqrt(pauses / (1 - pauses))
    long = 1 + spread * math.sqrt((1 - pauses) / pauses)
    if short <= 0:
        raise ValueError(f"a share of {pauses} of long gaps cannot give a coefficient of variation of {cv}; take less")
    for _ in range(count):
        yield rng.expovariate(1 / (long if rng.random() < pauses else short))


def zipf(rng: random.Random, count: int, exponent: float) -> int:
    """0 to `count` - 1, the k-th with weight (k + 1)^-exponent."""
    return rng.choices(range(count), [(k + 1) ** -exponent for k in range(count)])[0]


def lognormal(rng: random.Random, median: float, sigma: float, most: int) -> int:
    """1 to `most`."""
    return min(most, 1 + int(rng.lognormvariate(math.log(median), sigma)))


GENERATORS: Final[Mapping[str, Callable[[int, random.Random], Iterator[Session]]]] = {
    "shared_prefix": shared_prefix,
    "prefix_repetition": prefix_repetition,
    "agentic": agentic,
    "uniform": uniform,
    "tools": tools,
    "documents": documents,
    "bursts": bursts,
    "code": code,
    "flood": flood,
}
"""Name → generator of a synthetic load."""
