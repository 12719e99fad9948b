"""`make bench-peers`: Headrace beside SMG, sglang-router, vllm-router, Dynamo and LiteLLM, in one run.

    python -m loadtest.peers [NAME ...] [--rounds 5] [--quick] [--out build/bench]

Each comes from PyPI into an environment of its own under .venv-peers and stands before two workers of the same
simulated engine. All run at once and are loaded in turn; CPU seconds are those of the gateway's processes, from /proc.
One that cannot be installed or started is a line that says so.
"""

from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import uvloop
from cyclopts import App, Parameter

from loadtest.closed_loop import Target
from loadtest.machine import circumstances
from loadtest.peers.gateways import GATEWAYS, POLICIES, Gateway, headrace_name
from loadtest.peers.install import install
from loadtest.peers.measure import AT_ONCE, COSTS, STEPS, WORKLOADS, Measured, added_ttft, merged, rounds_of
from loadtest.peers.running import Fleet, NotRunning, Running, demo_model, headrace, peer, plain_workers, planes
from loadtest.peers.table import tables
from loadtest.written import check_folder, write

app = App(help=__doc__, version_flags=[])


@dataclass(frozen=True, slots=True)
class Extent:
    """How long it is measured."""

    rounds: int
    seconds: float
    requests: int


@app.default
def main(
    *names: Annotated[str, Parameter(help="Words of the names of those to compare. Default: all.")],
    rounds: Annotated[int, Parameter(help="How often each case is run through each.")] = 5,
    seconds: Annotated[float, Parameter(help="Length of one such run.")] = 3.0,
    quick: Annotated[bool, Parameter(help="Two rounds of a second each.", negative="")] = False,
    model: Annotated[
        Path | None, Parameter(help="Whose tokenizer. Default: the demo model's where it is installed, else bytes.")
    ] = None,
    out: Annotated[Path, Parameter(help="Where peers.json and peers.md are written.")] = Path("build/bench"),
) -> None:
    """Install, start, load in turn, print and write the tables."""
    extent = Extent(2, 1.0, 50) if quick else Extent(rounds, seconds, 200)
    ours = [policy for policy in POLICIES if _is_wanted(headrace_name(policy), names)]
    others = [gateway for gateway in GATEWAYS if _is_wanted(gateway.name, names)]
    absent = {gateway.name: why for gateway in others if (why := install(gateway))}
    others = [gateway for gateway in others if gateway.name not in absent]
    check_folder("out", out)
    where = circumstances()
    measured = uvloop.run(_measure(ours, others, model or demo_model(), extent, absent))
    result = {
        "circumstances": asdict(where),
        "extent": asdict(extent),
        "gateways": {name: asdict(each) for name, each in measured.items()},
        "absent": absent,
    }
    write(out, "peers", result, [f"{where}.", *tables(result)])


def _is_wanted(name: str, words: tuple[str, ...]) -> bool:
    return not words or any(word.lower() in name.lower() for word in words)


async def _measure(
    ours: list[str], others: list[Gateway], model: Path | None, extent: Extent, absent: dict[str, str]
) -> dict[str, Measured]:
    """In two fleets, one after the other: steps of 5 ms for what a gateway costs, none for what its clients see."""
    found: dict[str, Measured] = {}
    for environment, cases in ((STEPS, COSTS), (AT_ONCE, WORKLOADS)):
        async with AsyncExitStack() as cleanup:
            fleet = Fleet(environment, model)
            workers = await cleanup.enter_async_context(plain_workers(fleet, 2))
            gateways = await _started(cleanup, fleet, workers, ours, others, absent)
            rows = await rounds_of(gateways, cases, seconds=extent.seconds, rounds=extent.rounds)
            ttft_ms: dict[str, dict[str, list[float]]] = {each.name: {} for each in gateways}
            if cases is WORKLOADS:
                alone = Target(int(workers[0].rpartition(":")[2]), fleet.model_name)
                print("TTFT at one client …", flush=True)
                ttft_ms = await added_ttft(gateways, alone, requests=extent.requests, rounds=extent.rounds)
            for each in gateways:
                here = merged(each, rows[each.name], ttft_ms[each.name])
                first = found.get(each.name)
                if first is not None:  # memory and start are the first fleet's
                    refused = first.refused | here.refused
                    here = replace(first, rows=first.rows | here.rows, refused=refused, ttft_ms=here.ttft_ms)
                found[each.name] = here
    return found


async def _started(
    cleanup: AsyncExitStack,
    fleet: Fleet,
    workers: list[str],
    ours: list[str],
    others: list[Gateway],
    absent: dict[str, str],
) -> list[Running]:
    """Those that came to answer; `absent` is told about the others."""
    etcd = nats = ""
    if any(gateway.workers is not None for gateway in others):
        etcd, nats = await cleanup.enter_async_context(planes())
    begin = {headrace_name(policy): partial(headrace, policy, fleet) for policy in ours}
    begin |= {gateway.name: partial(peer, gateway, fleet, workers, etcd, nats) for gateway in others}
    running = []
    for name, make in begin.items():
        if name in absent:
            continue
        print(f"starting {name} …", flush=True)
        try:
            running.append(await cleanup.enter_async_context(make()))
        except (NotRunning, RuntimeError, TimeoutError, OSError) as exc:
            absent[name] = f"not started: {exc}"
            print(f"  {absent[name]}", flush=True)
    return running


if __name__ == "__main__":
    app()
