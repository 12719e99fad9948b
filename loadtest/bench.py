"""`make bench`: what Headrace itself costs, on the simulated engine.

    python -m loadtest.bench [--seconds 10] [--json OUT]

CPU seconds come from /proc, per process and divided by the tokens or requests of the same interval, so that a noisy
machine changes them little. Added TTFT is measured at concurrency 1 against the worker's own stream, alternating in one
run. The engine runs `--speedup` times faster than its simulated hardware, so that it is not what limits. What a
decision of the router costs is measured before all that, in this process (`loadtest/decisions.py`).
"""

import asyncio
import json
import random
import statistics
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import uvloop
from cyclopts import App, Parameter

from loadtest.client import Client, Sample
from loadtest.decisions import measure_all
from loadtest.processes import Process
from loadtest.stack import Stack, stack
from planes.streams.client import WorkerConnection, WorkerLost
from planes.wire.frames import Done, Failed, Format, Generate, Sampling, StreamId, pack_tokens
from planes.wire.messages import RequestId, WorkerId

SPEEDUP = 20.0
app = App(help=__doc__, version_flags=[])


@dataclass(frozen=True, slots=True)
class Row:
    """One case. cpu_us: microseconds of CPU per token or request, by kind of process."""

    case: str
    per: str
    count: int
    seconds: float
    cpu_us: dict[str, float]
    ttft_p50_ms: float
    errors: int


class Meter:
    """CPU seconds between two instants, by kind of process."""

    def __init__(self, processes: list[Process]) -> None:
        self._processes = processes
        self._before = [process.cpu_s() for process in processes]

    def spent_s(self) -> dict[str, float]:
        spent: dict[str, float] = {}
        for process, before in zip(self._processes, self._before, strict=True):
            kind = process.name.rsplit("-", 1)[0]
            spent[kind] = spent.get(kind, 0.0) + process.cpu_s() - before
        return spent


@dataclass(frozen=True, slots=True)
class Shape:
    """How many clients there are, and what each of their requests is like."""

    concurrency: int
    prompt_bytes: int
    max_tokens: int
    shared_bytes: int = 0
    """Of the prompt's, the leading ones that are the same in all requests."""


CASES: Final = {
    "c=64, 64 tokens": Shape(64, 200, 64),
    "c=256, 64 tokens": Shape(256, 200, 64),
    "c=64, 1 token, short prompt": Shape(64, 200, 1),
    "c=16, 1 token, 8k prompt, all shared": Shape(16, 8000, 1, shared_bytes=8000),
    "c=16, 1 token, 8k prompt, all new": Shape(16, 8000, 1),
}


def chat_body(model: str, prompt: str, max_tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def closed_loop(running: Stack, case: str, shape: Shape, *, seconds: float) -> Row:
    """Clients, each with its next request as soon as its last is answered, for `seconds`."""
    rng = random.Random(case)
    shared = "".join(rng.choices("abcdefgh ", k=shape.shared_bytes))
    samples: list[Sample] = []
    deadline = time.perf_counter() + seconds

    async def one(seed: int) -> None:
        own = random.Random(seed)
        client = Client("127.0.0.1", running.port)
        while time.perf_counter() < deadline:
            prompt = shared + "".join(own.choices("abcdefgh ", k=shape.prompt_bytes - shape.shared_bytes))
            samples.append(
                await client.post("/v1/chat/completions", chat_body(running.model, prompt, shape.max_tokens))
            )
        client.close()

    meter = Meter(running.processes())
    started_at = time.perf_counter()
    await asyncio.gather(*(one(rng.getrandbits(32)) for _ in range(shape.concurrency)))
    spent = meter.spent_s()
    good = [sample for sample in samples if not sample.error]
    per, count = ("request", len(good)) if shape.max_tokens == 1 else ("token", sum(s.completion_tokens for s in good))
    return Row(
        case=case,
        per=per,
        count=count,
        seconds=time.perf_counter() - started_at,
        cpu_us={kind: used / max(count, 1) * 1e6 for kind, used in spent.items()},
        ttft_p50_ms=statistics.median([s.ttft_s for s in good] or [float("nan")]) * 1e3,
        errors=len(samples) - len(good),
    )


class _FirstDelta:
    """A sink that notes when a worker's first text came."""

    def __init__(self) -> None:
        self.first_at = float("nan")
        self.ended = asyncio.Event()

    def on_delta(self, payload: bytes, tokens: list[int]) -> None:  # noqa: ARG002 - the protocol's
        if tokens and self.first_at != self.first_at:
            self.first_at = time.perf_counter()

    def on_done(self, done: Done) -> None:
        self.on_delta(done.payload, done.tokens)
        self.ended.set()

    def on_failed(self, failed: Failed) -> None:
        raise RuntimeError(f"the worker refused: {failed.message}")

    def on_lost(self, error: WorkerLost) -> None:
        raise error


async def added_ttft(running: Stack, rounds: int) -> dict[str, float]:
    """TTFT of a short new prompt through the gateway and on the worker's own stream, in turn. Milliseconds."""
    direct: list[float] = []
    through: list[float] = []
    rng = random.Random(7)
    client = Client("127.0.0.1", running.port)
    worker, epoch, address = await asyncio.to_thread(_decode_worker, running)
    deadline = asyncio.get_running_loop().time() + 5
    connection = await WorkerConnection.open(worker, epoch, address, deadline=deadline)
    for number in range(rounds):
        prompt = "".join(rng.choices("abcdefgh ", k=200))
        sample = await client.post("/v1/chat/completions", chat_body(running.model, prompt, 8))
        through.append(sample.ttft_s)
        sink = _FirstDelta()
        request = Generate(
            StreamId(0),
            RequestId(f"direct-{number}"),
            pack_tokens([b ^ 1 for b in prompt.encode()]),
            Sampling(max_tokens=8),
            Format(kind="chat", response_id="x", model=running.model, created=0, is_streaming=True),
        )
        started_at = time.perf_counter()
        connection.start(request, sink)
        await sink.ended.wait()
        direct.append(sink.first_at - started_at)
    client.close()
    connection.close()
    gateway, alone = statistics.median(through) * 1e3, statistics.median(direct) * 1e3
    return {"through_gateway_ms": gateway, "engine_alone_ms": alone, "added_ms": gateway - alone}


@app.default
def main(
    *,
    seconds: Annotated[float, Parameter(help="Length of each case.")] = 10.0,
    out: Annotated[Path | None, Parameter(name="--json", help="Write everything there too.")] = None,
) -> None:
    """Run every case once."""
    decisions = measure_all(num_decisions=4000)
    result = {"decisions": [asdict(each) for each in decisions]} | uvloop.run(run(seconds))
    if out is not None:
        out.write_text(json.dumps(result, indent=1))


async def run(seconds: float) -> dict[str, object]:
    """Run all cases, print as they end.  Returns everything printed."""
    environment = {"HEADRACE_SPEEDUP": str(SPEEDUP)}
    print(f"starting etcd, NATS, two simulated workers and a gateway (speedup {SPEEDUP:g}) …", flush=True)
    async with stack("--engine", "sim", "--prefill", "1", "--decode", "1", environment=environment) as running:
        print(f"idle for {seconds:g} s …", flush=True)
        meter = Meter(running.processes())
        await asyncio.sleep(seconds)
        idle = {kind: used / seconds * 100 for kind, used in meter.spent_s().items()}
        print("idle, % of a core: " + ", ".join(f"{kind} {share:.2f}" for kind, share in idle.items()), flush=True)
        print(f"  in all {sum(idle.values()):.2f} % (aim: < 5)", flush=True)
        rows = []
        for case, shape in CASES.items():
            print(f"{case} …", flush=True)
            await closed_loop(running, case, shape, seconds=min(2.0, seconds))
            rows.append(await closed_loop(running, case, shape, seconds=seconds))
            _print(rows[-1])
        ttft = await added_ttft(running, rounds=50)
        print("TTFT at concurrency 1, median: " + ", ".join(f"{k} {v:.2f}" for k, v in ttft.items()), flush=True)
        memory = {p.name: p.rss_bytes() / 1e6 for p in running.processes()}
        print("memory after all that, MB: " + ", ".join(f"{k} {v:.0f}" for k, v in memory.items()), flush=True)
    return {"idle_percent": idle, "rows": [asdict(r) for r in rows], "ttft": ttft, "memory_mb": memory}


def _print(row: Row) -> None:
    costs = ", ".join(f"{kind} {cost:.1f}" for kind, cost in sorted(row.cpu_us.items()))
    rate = row.count / row.seconds
    print(f"  CPU µs per {row.per}: {costs}  ({rate:,.0f} {row.per}s/s, TTFT p50 {row.ttft_p50_ms:.1f} ms)", flush=True)
    if row.errors:
        print(f"  {row.errors} requests failed", flush=True)


def _decode_worker(running: Stack) -> tuple[WorkerId, int, str]:
    """Id, epoch and address of the decode worker."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/v1/fleet") as answer:
        workers = json.load(answer)["workers"]
    found = next(worker for worker in workers if worker["role"] == "decode")
    return WorkerId(found["worker"]), found["epoch"], found["address"]


if __name__ == "__main__":
    app()
