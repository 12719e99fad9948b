"""Many streams open at once: what one takes in the gateway, and what it adds to the gaps between their tokens."""

import asyncio
from dataclasses import dataclass

from loadtest.closed_loop import Row, Shape, Target, closed_loop
from loadtest.peers.running import Fleet, plain_workers
from loadtest.stack import fast_engine, stack

_TOKENS = 120
"""Enough that the crowd of the beginning is in fewer than one gap of a hundred."""
_TOKENS_PER_S = 10_000
"""Of all streams together: what the load's own client reads at ease."""


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """gap_ms: p50 and p99 through the gateway.  gap_alone_ms: at two workers of the same engine, by the same client."""

    count: int
    step_s: float
    kb_each: float
    gap_ms: tuple[float, float]
    gap_alone_ms: tuple[float, float]


async def open_streams(count: int, policy: str, environment: dict[str, str]) -> OpenStreams:
    """Each client has one stream of some tokens; steps are long enough for all to be read in time.

    All prompts are the same, so that what the tokenizer remembers of texts, in bounds of its own, counts for no stream.
    """
    print(f"{count:,} open streams …", flush=True)
    step_s = count / _TOKENS_PER_S
    environment = environment | fast_engine(step_s) | {"HEADRACE_QUEUE_LIMIT": str(count)}
    shape = Shape(count, 200, _TOKENS, shared_bytes=200)
    flags = ("--engine", "sim", "--prefill", "0", "--decode", "0", "--both", "2", "--policy", policy)
    async with stack(*flags, environment=environment) as running:
        gateway = next(process for process in running.processes() if process.name == "gateway")
        target = Target(running.port, running.model)
        await closed_loop(target, "warm", Shape(16, 200, 8), seconds=0.5)
        before = gateway.rss_bytes()
        through = all_answered(await closed_loop(target, "open", shape, seconds=0.0))
        most = gateway.peak_bytes()
    async with plain_workers(Fleet(environment, None), 2) as urls:
        half = Shape(count // 2, 200, _TOKENS, shared_bytes=200)
        alone = await asyncio.gather(
            *(closed_loop(Target(int(url.rpartition(":")[2]), "sim"), "alone", half, seconds=0.0) for url in urls)
        )
    p50, p99 = (max(getattr(all_answered(row), name) for row in alone) for name in ("gap_p50_ms", "gap_p99_ms"))
    gap_ms = (through.gap_p50_ms, through.gap_p99_ms)
    return OpenStreams(count, step_s, (most - before) / 1e3 / count, gap_ms, (p50, p99))


def all_answered(row: Row) -> Row:
    """Memory and gaps of those that were let in say nothing of as many as were asked for.

    Raises:  RuntimeError.
    """
    if row.errors:
        raise RuntimeError(f"{row.errors:,} of the streams failed, the first with: {row.error}")
    return row
