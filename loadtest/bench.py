"""`make bench`: what Headrace itself costs, on the simulated engine.

    python -m loadtest.bench [--rounds 3] [--seconds 3] [--quick] [--streams 20000] [--out build/bench]

CPU seconds come from /proc, per process and divided by the tokens or requests of the same interval, so that a noisy
machine changes them little. The engine's steps take 5 ms whatever is in them, and its tokens are bytes. Parts that need
no fleet are measured first, in this process: a decision, a prompt's way, frames, the index, a handover.
`make bench-peers` has the same loads through other gateways, and what is added to a worker's own first token.
"""

import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import uvloop
from cyclopts import App, Parameter

from loadtest.bench_parts import measure_parts
from loadtest.bench_streams import OpenStreams, open_streams
from loadtest.closed_loop import CHAT, RESPONSES, Row, Shape, Target, warm_closed_loop
from loadtest.decisions import measure_all
from loadtest.machine import circumstances
from loadtest.processes import allow_files
from loadtest.progress import Progress
from loadtest.stack import fast_engine, stack
from loadtest.written import check_folder, grid, write

app = App(help=__doc__, version_flags=[])
_SMALL: Final = fast_engine(0.005) | {
    "HEADRACE_CONTEXT_LENGTH": "100000",
    "HEADRACE_MAX_BATCH": "32768",
    "HEADRACE_NUM_BLOCKS": "400000",
}
"""With room for long prompts and many streams."""
_PROMPTS: Final = {"30": 30, "1k": 1000, "8k": 8000, "64k": 64_000}
_FEW_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class Extent:
    """How long, and how much, is measured."""

    rounds: int
    seconds: float
    open_streams: tuple[int, ...]


def cases() -> dict[str, Shape]:
    """Streams of 64 tokens by their number; requests for one token by length, sharing and API."""
    found = {f"{count} streams of 64 tokens": Shape(count, 200, 64) for count in (1, 64, 256, 2000)}
    for name, length in _PROMPTS.items():
        for api in (CHAT, RESPONSES):
            kind = api.path.removeprefix("/v1/").removesuffix("/completions")
            for how, shared in (("shared", length), ("new", 0)):
                clients = 64 if length == 30 else 16
                found[f"{kind}, {name} tokens, {how}"] = Shape(clients, length, 1, shared, api)
    return found


@app.default
def main(
    *,
    rounds: Annotated[int, Parameter(help="How often each case is run.")] = 3,
    seconds: Annotated[float, Parameter(help="Length of one such run.")] = 3.0,
    quick: Annotated[bool, Parameter(help="One round of a second.", negative="")] = False,
    streams: Annotated[int, Parameter(help="Most that are open at once; needs 1,000 open files more.")] = 2000,
    policy: Annotated[str, Parameter(help="Routing policy.")] = "headrace",
    out: Annotated[Path, Parameter(help="Where bench.json and bench.md are written.")] = Path("build/bench"),
) -> None:
    """Run everything, print and write the tables."""
    counts = tuple(sorted({2000, streams}))
    extent = Extent(1, 1.0, counts) if quick else Extent(rounds, seconds, counts)
    allow_files(max(counts) + _FEW_FILES)
    check_folder("out", out)
    where = circumstances()
    result: dict[str, Any] = {"circumstances": asdict(where), "extent": asdict(extent), "policy": policy}
    result["decisions"] = [asdict(each) for each in measure_all(num_decisions=1000 if quick else 4000)]
    result["parts"] = measure_parts(rounds=1 if quick else extent.rounds)
    result |= uvloop.run(_measure(extent, policy))
    write(out, "bench", result, [f"{where}.", *tables(result)])


async def _measure(extent: Extent, policy: str) -> dict[str, Any]:
    print("starting etcd, NATS, two simulated workers and a gateway …", flush=True)
    flags = ("--engine", "sim", "--prefill", "0", "--decode", "0", "--both", "2", "--policy", policy)
    rows: dict[str, list[Row]] = defaultdict(list)
    shapes = cases()
    progress = Progress(extent.rounds * len(shapes))
    async with stack(*flags, environment=_SMALL) as running:
        target = Target(running.port, running.model, running.processes())
        for number in range(extent.rounds):
            for case, shape in shapes.items():
                progress.start(f"round {number + 1}, {case}")(0, 1)
                rows[case].append(await warm_closed_loop(target, case, shape, seconds=extent.seconds, run=number))
                progress.end()
        memory = {process.name: process.rss_bytes() / 1e6 for process in running.processes()}
    opened = [await open_streams(count, policy, _SMALL) for count in extent.open_streams]
    return {
        "rows": {case: [asdict(row) for row in found] for case, found in rows.items()},
        "memory_mb": memory,
        "open_streams": [asdict(each) for each in opened],
    }


def tables(result: dict[str, Any]) -> list[str]:
    """Markdown of what `bench.json` holds."""
    return [_loads(result), _opened(result), _parts(result), _decisions(result)]


def median_of(result: dict[str, Any], case: str, kind: str) -> float:
    """CPU of a kind of process, µs per token or request."""
    costs: list[float] = [row["cpu_us"][kind] for row in result["rows"][case]]
    return statistics.median(costs)


def _loads(result: dict[str, Any]) -> str:
    head = ["load", "gateway, µs", "both workers, µs", "per", "TTFT p50 / p99, ms", "gap p99, ms", "a second", "failed"]
    lines = []
    for case, rows in result["rows"].items():
        middle = {name: statistics.median(row[name] for row in rows) for name in ("ttft_p50_ms", "ttft_p99_ms")}
        costs = [row["cpu_us"]["gateway"] for row in rows]
        spread = f"{median_of(result, case, 'gateway'):,.1f} ({min(costs):,.1f} to {max(costs):,.1f})"
        lines.append(
            [
                case,
                spread,
                f"{median_of(result, case, 'both'):,.1f}",
                rows[0]["per"],
                f"{middle['ttft_p50_ms']:.1f} / {middle['ttft_p99_ms']:.1f}",
                "-" if rows[0]["per"] == "request" else f"{statistics.median(row['gap_p99_ms'] for row in rows):.1f}",
                f"{statistics.median(row['count'] / row['seconds'] for row in rows):,.0f}",
                str(sum(row["errors"] for row in rows)),
            ]
        )
    memory = ", ".join(f"{name} {size:.0f}" for name, size in result["memory_mb"].items())
    title = f"Policy {result['policy']}: CPU, median (least to most). Resident memory afterwards, MB: {memory}."
    return f"{title}\n\n{grid(head, lines)}"


def _opened(result: dict[str, Any]) -> str:
    head = ["open streams", "step, ms", "memory of one in the gateway, KB", "gap p50 / p99, ms", "at the workers, ms"]
    lines = []
    for fields in result["open_streams"]:
        each = OpenStreams(**fields)
        ways = [f"{p50:.1f} / {p99:.1f}" for p50, p99 in (each.gap_ms, each.gap_alone_ms)]
        lines.append([f"{each.count:,}", f"{each.step_s * 1e3:.0f}", f"{each.kb_each:.1f}", *ways])
    return f"Streams that are open at once; the last column without a gateway.\n\n{grid(head, lines)}"


def _parts(result: dict[str, Any]) -> str:
    lines = [[name, f"{value:,.2f}"] for name, value in result["parts"].items()]
    return f"Parts, each alone.\n\n{grid(['part', 'figure'], lines)}"


def _decisions(result: dict[str, Any]) -> str:
    costs = {(c["has_slos"], c["num_workers"], c["policy"]): c["cpu_us"] for c in result["decisions"]}
    columns = [(slos, policy) for slos in (False, True) for policy in ("headrace", "least_loaded")]
    head = ["workers", *(f"{policy}{', SLOs' if slos else ''}" for slos, policy in columns)]
    workers = sorted({number for _, number, _ in costs})
    lines = [[str(n), *(f"{costs[slos, n, policy]:,.0f}" for slos, policy in columns)] for n in workers]
    return f"A decision of the router: submitted, decided and released, µs of CPU.\n\n{grid(head, lines)}"


if __name__ == "__main__":
    app()
