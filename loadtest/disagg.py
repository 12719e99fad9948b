"""`make bench-disagg`: real vLLM, a prefill and a decode worker behind Headrace against two plain servers in turn.

    python -m loadtest.disagg [--seconds 60] [--rounds 3] [--quick] [--out build/bench]

Long prompts among chats (`loadtest/live.py`: Poisson arrivals drawn before the run, which do not wait for answers), the
same for both but for their first word. The plain servers are vLLM's own (`vllm serve`), with the same model and limits;
the load's client takes them in turn. Both fleets are up at once and are loaded in turn. CPU is told apart: engines, and
what is around them, which is vLLM's API server there, gateway and worker processes here.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import uvloop
from cyclopts import App, Parameter

from loadtest.client import Sample
from loadtest.closed_loop import Meter, quantile_ms
from loadtest.live import Arrival, mixed_arrivals, replay_in_turn
from loadtest.machine import circumstances
from loadtest.peers.running import answering, ours_in, process_of
from loadtest.processes import Process, descendants, free_port
from loadtest.slo import Slo, mean_gap_s
from loadtest.stack import stack
from loadtest.written import check_folder, grid, write
from workers.demo_model.convert import ensure_demo_model

app = App(help=__doc__, version_flags=[])
_PLAIN, _OURS = "two plain vLLM servers in turn", "Headrace, one prefill and one decode worker"
_MODEL: Final = "smollm2-135m"
_CONTEXT, _BLOCK, _BATCH, _KV_BYTES = 2048, 32, 32, 256 << 20
Send = Callable[[Sequence[Arrival]], Awaitable[list[Sample]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One round of one variant. around_us: CPU of all but the engines, per token.  goodput: share within both SLOs."""

    chat_ttft_p50_ms: float
    chat_ttft_p99_ms: float
    long_ttft_p50_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tokens_per_s: float
    goodput: float
    around_us: float
    engine_us: float
    requests: int
    failed: int


@app.default
def main(
    *,
    seconds: Annotated[float, Parameter(help="Of arrivals in each round.")] = 60.0,
    rounds: Annotated[int, Parameter(help="How often each variant is loaded.")] = 3,
    rate: Annotated[float, Parameter(help="Times 0.5 long prompts and 0.8 chats a second.")] = 1.0,
    slo_ttft_s: Annotated[float, Parameter(help="For goodput.")] = 2.0,
    slo_itl_s: Annotated[float, Parameter(help="For goodput: the mean gap of one answer.")] = 0.1,
    quick: Annotated[bool, Parameter(help="One round of 15 seconds.", negative="")] = False,
    out: Annotated[Path, Parameter(help="Where disagg.json and disagg.md are written.")] = Path("build/bench"),
) -> None:
    """Start both, load in turn, print and write the table."""
    check_folder("out", out)
    where = circumstances()
    if quick:
        seconds, rounds = 15.0, 1
    found = uvloop.run(_measure(seconds, rounds, rate, Slo(slo_ttft_s, slo_itl_s)))
    result = {
        "circumstances": asdict(where),
        "slo": {"ttft_s": slo_ttft_s, "itl_s": slo_itl_s},
        "variants": {variant: [asdict(each) for each in outcomes] for variant, outcomes in found.items()},
    }
    write(out, "disagg", result, [f"{where}.", *tables(result)])


async def _measure(seconds: float, rounds: int, rate: float, slo: Slo) -> dict[str, list[Outcome]]:
    async with AsyncExitStack() as cleanup:
        print("starting two plain vLLM servers …", flush=True)
        ports = [free_port(), free_port()]
        plain = [process for port in ports for process in await _plain_server(cleanup, port)]
        print("starting Headrace with a prefill and a decode worker …", flush=True)
        limits = {"CONTEXT_LENGTH": _CONTEXT, "BLOCK_SIZE": _BLOCK, "MAX_BATCH": _BATCH, "KV_CACHE_BYTES": _KV_BYTES}
        environment = {f"HEADRACE_{name}": str(value) for name, value in limits.items()}
        ours = await cleanup.enter_async_context(stack("--served-model-name", _MODEL, environment=environment))
        sends: dict[str, tuple[Send, list[Process]]] = {
            _PLAIN: (partial(replay_in_turn, ports), plain),
            _OURS: (partial(replay_in_turn, [ours.port]), ours.processes()),
        }
        outcomes: dict[str, list[Outcome]] = {variant: [] for variant in sends}
        for number in range(-1, rounds):
            for variant, (send, processes) in sends.items():
                length_s = 8.0 if number < 0 else seconds
                what = "warming up" if number < 0 else f"round {number + 1} of {rounds}"
                print(f"{what}, {length_s:g} s: {variant} …", flush=True)
                arrivals = mixed_arrivals(_MODEL, length_s, number, rate, variant)
                meter, begun_s = Meter([_apart(process) for process in processes]), time.monotonic()
                samples = await send(arrivals)
                elapsed_s = time.monotonic() - begun_s
                if number >= 0:
                    outcomes[variant].append(outcome(arrivals, samples, meter.spent_s(), elapsed_s, slo))
    return outcomes


async def _plain_server(cleanup: AsyncExitStack, port: int) -> list[Process]:
    """vLLM's own server on this port, and its engine process."""
    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="headrace-plain-vllm-")))
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--model", str(ensure_demo_model()), "--served-model-name", _MODEL, "--dtype", "float32"]
    argv += ["--max-model-len", str(_CONTEXT), "--block-size", str(_BLOCK), "--max-num-seqs", str(_BATCH)]
    argv += ["--kv-cache-memory-bytes", str(_KV_BYTES), "--enforce-eager", "--disable-uvicorn-access-log"]
    process = await cleanup.enter_async_context(process_of(argv, ours_in({}), folder / "log"))
    await answering(port, _MODEL, process, folder / "log", patience_s=300)
    return [Process(process.pid, "api"), *(Process(child.pid, "engine of api") for child in descendants(process.pid))]


def _apart(process: Process) -> Process:
    """Named by its part: an engine, or what is around engines. etcd and NATS are neither's."""
    kind = "engine" if process.name.startswith("engine") else "planes" if process.name in ("etcd", "nats") else "around"
    return Process(process.pid, kind)


def outcome(
    arrivals: Sequence[Arrival],
    samples: Sequence[Sample],
    spent_s: dict[str, float],
    elapsed_s: float,
    slo: Slo,
) -> Outcome:
    """spent_s: CPU by `engine` and `around`.  slo: a request that failed does not hold it."""
    good = [(arrival.kind, sample) for arrival, sample in zip(arrivals, samples, strict=True) if not sample.error]
    gaps = [gap for _, sample in good for gap in sample.gaps_s]
    num_tokens = sum(sample.completion_tokens for _, sample in good)
    held = sum(slo.is_held(sample.ttft_s, mean_gap_s(sample.gaps_s)) for _, sample in good)
    chats = [sample.ttft_s for kind, sample in good if kind == "chat"]
    return Outcome(
        chat_ttft_p50_ms=quantile_ms(chats, 0.5),
        chat_ttft_p99_ms=quantile_ms(chats, 0.99),
        long_ttft_p50_ms=quantile_ms([sample.ttft_s for kind, sample in good if kind == "long"], 0.5),
        itl_p50_ms=quantile_ms(gaps, 0.5),
        itl_p99_ms=quantile_ms(gaps, 0.99),
        tokens_per_s=num_tokens / elapsed_s,
        goodput=held / len(samples),
        around_us=spent_s.get("around", 0.0) / max(num_tokens, 1) * 1e6,
        engine_us=spent_s.get("engine", 0.0) / max(num_tokens, 1) * 1e6,
        requests=len(samples),
        failed=len(samples) - len(good),
    )


_COLUMNS: Final = {
    "chat_ttft_p50_ms": ("chats' TTFT p50, ms", "{:,.0f}"),
    "chat_ttft_p99_ms": ("p99, ms", "{:,.0f}"),
    "long_ttft_p50_ms": ("long prompts' TTFT p50, ms", "{:,.0f}"),
    "itl_p50_ms": ("gap p50, ms", "{:,.1f}"),
    "itl_p99_ms": ("gap p99, ms", "{:,.1f}"),
    "tokens_per_s": ("tokens/s", "{:,.1f}"),
    "goodput": ("goodput", "{:.0%}"),
    "around_us": ("CPU around the engines, µs per token", "{:,.0f}"),
    "engine_us": ("CPU of the engines, µs per token", "{:,.0f}"),
}


def tables(result: dict[str, Any]) -> list[str]:
    """Markdown of what `disagg.json` holds: medians, least and most of the rounds."""
    lines = []
    for variant, rounds in result["variants"].items():
        cells = [variant]
        for name, (_, form) in _COLUMNS.items():
            found = [each[name] for each in rounds]
            spread = f" ({form.format(min(found))} to {form.format(max(found))})" if len(found) > 1 else ""
            cells.append(form.format(statistics.median(found)) + spread)
        lines.append([*cells, f"{sum(e['failed'] for e in rounds)} of {sum(e['requests'] for e in rounds)}"])
    slo = result["slo"]
    title = (
        f"Goodput: the share of requests with a TTFT of at most {slo['ttft_s']:g} s and gaps of at most "
        f"{slo['itl_s'] * 1e3:g} ms on average. Medians (least to most of the rounds)."
    )
    return [f"{title}\n\n{grid(['', *(head for head, _ in _COLUMNS.values()), 'failed'], lines)}"]


if __name__ == "__main__":
    app()
