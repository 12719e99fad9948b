"""A closed loop: clients, each with its next request as soon as its last is answered, and what that cost whom."""

import asyncio
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from loadtest.client import Client, Sample
from loadtest.processes import Process
from loadtest.prompts import prose


@dataclass(frozen=True, slots=True)
class Api:
    """How one of the APIs is asked for an answer to one prompt."""

    path: str
    tokens_field: str

    def body(self, model: str, prompt: str, max_tokens: int, *, is_streaming: bool = True) -> dict[str, Any]:
        said = (
            {"input": prompt} if self.path == "/v1/responses" else {"messages": [{"role": "user", "content": prompt}]}
        )
        body = {"model": model, **said, self.tokens_field: max_tokens, "stream": is_streaming}
        if is_streaming and self.path == "/v1/chat/completions":
            body["stream_options"] = {"include_usage": True}
        return body


CHAT: Final = Api("/v1/chat/completions", "max_tokens")
RESPONSES: Final = Api("/v1/responses", "max_output_tokens")
MESSAGES: Final = Api("/v1/messages", "max_tokens")


@dataclass(frozen=True, slots=True)
class Shape:
    """How many clients there are, and what each of their requests is like."""

    concurrency: int
    prompt_bytes: int
    max_tokens: int
    shared_bytes: int = 0
    """Of the prompt's, the leading ones that are the same in all requests."""
    api: Api = CHAT
    is_streaming: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send the load, and whose CPU to count.

    processes: read at the beginning and the end of each run; those of one kind, `NAME-…`, are added up.
    """

    port: int
    model: str
    processes: Sequence[Process] = field(default=())


@dataclass(frozen=True, slots=True)
class Row:
    """One case. cpu_us: microseconds of CPU per token or request, by kind of process.  Times: as clients saw them."""

    case: str
    per: str
    count: int
    seconds: float
    cpu_us: dict[str, float]
    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    whole_p50_ms: float
    whole_p99_ms: float
    requests_per_s: float
    errors: int
    error: str
    """The first one's text."""


class Meter:
    """CPU seconds between two instants, by kind of process."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._processes = processes
        self._before = [process.cpu_s() for process in processes]

    def spent_s(self) -> dict[str, float]:
        spent: dict[str, float] = {}
        for process, before in zip(self._processes, self._before, strict=True):
            kind = process.name.rsplit("-", 1)[0]
            spent[kind] = spent.get(kind, 0.0) + process.cpu_s() - before
        return spent


def prompts(case: str, shape: Shape, *, run: int, client: int) -> Iterator[str]:
    """One client's, without end: what they do not share is new in each of them, for each client and run of a case."""
    shared = _shared(case, shape.shared_bytes)
    own = random.Random(f"{case}, {run}, {client}")
    while True:
        yield shared + prose(own, shape.prompt_bytes - shape.shared_bytes)


@lru_cache(maxsize=1)
def _shared(case: str, length: int) -> str:
    """Made once for all clients of a case, before its load is measured."""
    return prose(random.Random(case), length)


async def closed_loop(target: Target, case: str, shape: Shape, *, seconds: float, run: int = 0) -> Row:
    """Run it for `seconds`, and until what was begun then has ended; each client asks once at least.

    Args:  run: the same one sends the same prompts.
    """
    _shared(case, shape.shared_bytes)
    samples: list[Sample] = []
    deadline = time.perf_counter() + seconds

    async def one(number: int) -> None:
        client = Client("127.0.0.1", target.port)
        for prompt in prompts(case, shape, run=run, client=number):
            body = shape.api.body(target.model, prompt, shape.max_tokens, is_streaming=shape.is_streaming)
            samples.append(await client.post(shape.api.path, body))
            if time.perf_counter() >= deadline:
                break
            if samples[-1].error:
                await asyncio.sleep(0.05)  # whoever refuses everything should not be asked without end
        client.close()

    meter = Meter(target.processes)
    started_at = time.perf_counter()
    await asyncio.gather(*map(one, range(shape.concurrency)))
    spent, elapsed_s = meter.spent_s(), time.perf_counter() - started_at
    return row_of(case, shape, samples, spent, elapsed_s)


async def warm_closed_loop(target: Target, case: str, shape: Shape, *, seconds: float, run: int) -> Row:
    """`closed_loop` after a shorter one, with other prompts, that does not count."""
    await closed_loop(target, case, shape, seconds=min(0.5, seconds / 4), run=-1 - run)
    return await closed_loop(target, case, shape, seconds=seconds, run=run)


def row_of(case: str, shape: Shape, samples: Sequence[Sample], spent: dict[str, float], elapsed_s: float) -> Row:
    """spent: CPU seconds by kind of process."""
    good = [sample for sample in samples if not sample.error]
    per, count = ("request", len(good)) if shape.max_tokens == 1 else ("token", sum(s.completion_tokens for s in good))
    ttfts = [sample.ttft_s for sample in good]
    gaps = [gap for sample in good for gap in sample.gaps_s]
    wholes = [sample.ended_at - sample.sent_at for sample in good]
    return Row(
        case=case,
        per=per,
        count=count,
        seconds=elapsed_s,
        cpu_us={kind: used / max(count, 1) * 1e6 for kind, used in spent.items()},
        ttft_p50_ms=quantile_ms(ttfts, 0.5),
        ttft_p99_ms=quantile_ms(ttfts, 0.99),
        gap_p50_ms=quantile_ms(gaps, 0.5),
        gap_p99_ms=quantile_ms(gaps, 0.99),
        whole_p50_ms=quantile_ms(wholes, 0.5),
        whole_p99_ms=quantile_ms(wholes, 0.99),
        requests_per_s=len(good) / elapsed_s,
        errors=len(samples) - len(good),
        error=next((sample.error for sample in samples if sample.error), "")[:300],
    )


def quantile_ms(seconds: Sequence[float], share: float) -> float:
    """NaN of nothing."""
    if not seconds:
        return float("nan")
    if share == 0.5:
        return statistics.median(seconds) * 1e3
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))] * 1e3
