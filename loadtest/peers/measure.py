"""The cases, and rounds of them through every gateway in turn."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loadtest.client import Client
from loadtest.closed_loop import CHAT, MESSAGES, RESPONSES, Api, Row, Shape, Target, quantile_ms, warm_closed_loop
from loadtest.peers.running import Running
from loadtest.progress import Progress
from loadtest.prompts import prose
from loadtest.stack import fast_engine

_ROOM: Final = {"HEADRACE_NUM_BLOCKS": "65536"}
STEPS: Final = fast_engine(0.005) | _ROOM
"""Workers whose steps take 5 ms."""
AT_ONCE: Final = fast_engine(0.0001) | _ROOM
"""Workers that answer at once."""

PER_TOKEN, PER_REQUEST = "256 streams of 64 tokens", "64 clients, 1 token"
SHARED, NEW = "8k-character prompt, all shared", "8k-character prompt, all new"
COSTS: Final = {
    PER_TOKEN: Shape(256, 200, 64),
    PER_REQUEST: Shape(64, 200, 1),
    SHARED: Shape(16, 8000, 1, shared_bytes=8000),
    NEW: Shape(16, 8000, 1),
}
"""CPU of the gateway's processes is what counts."""


def _workload(api: Api, *, is_streaming: bool) -> Shape:
    return Shape(10, 60, 8, api=api, is_streaming=is_streaming)


WORKLOADS: Final = {
    "chat": _workload(CHAT, is_streaming=False),
    "chat, streamed": _workload(CHAT, is_streaming=True),
    "responses": _workload(RESPONSES, is_streaming=False),
    "responses, streamed": _workload(RESPONSES, is_streaming=True),
    "messages": _workload(MESSAGES, is_streaming=False),
    "messages, streamed": _workload(MESSAGES, is_streaming=True),
}
"""Ten clients: what they see is what counts."""
ADDED: Final = "TTFT at one client"


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one gateway. rows: by case, one for each round.  ttft_ms: p50 and p99 of each round, through it and at a
    worker itself, by name.  refused: cases that it does not serve, with what it said.
    """

    rows: dict[str, list[Row]]
    ttft_ms: dict[str, list[float]]
    refused: dict[str, str]
    memory_mb: dict[str, float]
    start_s: float
    note: str


async def rounds_of(
    gateways: Sequence[Running], cases: dict[str, Shape], *, seconds: float, rounds: int
) -> dict[str, dict[str, list[Row]]]:
    """By gateway and case. Every round runs each case through all gateways in turn, the first one later each time."""
    progress = Progress(rounds * len(cases) * len(gateways))
    rows: dict[str, dict[str, list[Row]]] = {each.name: defaultdict(list) for each in gateways}
    for number in range(rounds):
        for case, shape in cases.items():
            for place in range(len(gateways)):
                each = gateways[(place + number) % len(gateways)]
                on_progress = progress.start(f"round {number + 1}, {case}, {each.name}")
                on_progress(0, 1)
                if not _is_refused(rows[each.name][case]):
                    row = await warm_closed_loop(each.target, case, shape, seconds=seconds, run=number)
                    rows[each.name][case].append(row)
                progress.end()
    return rows


def _is_refused(rows: Sequence[Row]) -> bool:
    return bool(rows) and not rows[-1].count


async def added_ttft(
    gateways: Sequence[Running], worker: Target, *, requests: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """By gateway: p50 and p99 of a chat's TTFT at one client, through it and at a worker itself, in turn; ms."""
    rng = random.Random(7)
    found: dict[str, dict[str, list[float]]] = {each.name: defaultdict(list) for each in gateways}
    direct = Client("127.0.0.1", worker.port)
    for _ in range(rounds):
        for each in gateways:
            through = Client("127.0.0.1", each.target.port)
            seconds: dict[str, list[float]] = {"through": [], "alone": []}
            for _ in range(requests):
                prompt = prose(rng, 200)
                for way, client, model in (("through", through, each.target.model), ("alone", direct, worker.model)):
                    sample = await client.post(CHAT.path, CHAT.body(model, prompt, 2))
                    if not sample.error and not math.isnan(sample.ttft_s):
                        seconds[way].append(sample.ttft_s)
            through.close()
            for way, values in seconds.items():
                for point, share in (("p50", 0.5), ("p99", 0.99)):
                    found[each.name][f"{way} {point}"].append(quantile_ms(values, share))
    direct.close()
    return found


def memory_of(each: Running) -> dict[str, float]:
    """MB of its processes together: now, shared pages shared out, and the most it ever was."""
    processes = each.target.processes
    return {
        "rss": sum(process.rss_bytes() for process in processes) / 1e6,
        "pss": sum(process.pss_bytes() for process in processes) / 1e6,
        "peak": sum(process.peak_bytes() for process in processes) / 1e6,
    }


def merged(each: Running, rows: dict[str, list[Row]], ttft_ms: dict[str, list[float]]) -> Measured:
    """What it refused apart from what it did."""
    refused = {case: (found[-1].error or "no answers") for case, found in rows.items() if _is_refused(found)}
    served = {case: found for case, found in rows.items() if case not in refused}
    return Measured(served, dict(ttft_ms), refused, memory_of(each), each.start_s, each.note)
