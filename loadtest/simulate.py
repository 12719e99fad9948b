"""Compare routing policies on a simulated fleet: `python -m loadtest.simulate --help`.

One run serves one workload with one policy (`loadtest/simulator/`). `--matrix docs` runs the comparison that
`docs/routing.md` reports, and writes its tables, plots and JSON.
"""

import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number

from app.recording import TRACE_BLOCK_SIZE
from loadtest.engine_flags import AT_LEAST_1, POSITIVE, RATE, STANDARD, EngineFlags, check_unused
from loadtest.like import LiveFleet
from loadtest.progress import Progress, each
from loadtest.report import Report, Row, markdown, summarise, table, write
from loadtest.simulator.scenario import Faults, Scenario
from loadtest.simulator.simulation import Simulation
from loadtest.slo import Slo
from loadtest.workloads import GENERATORS, Workload, check_fits, load
from loadtest.written import check_file, check_folder
from planes.wire.errors import UnusableSetting
from planes.wire.messages import EngineFacts, Role
from process.logging import configure
from process.settings import run
from router.policies import POLICIES, load_policy

_BEGIN, _END = "<!-- results: written by make simulate -->", "<!-- end of results -->"


@dataclass(frozen=True, slots=True)
class Case:
    """One load on one fleet: a row per policy comes of it."""

    workload: str
    rate: float
    num_prefill: int
    num_decode: int
    num_both: int = 0
    slow_worker: float = 1.0
    num_gateways: int = 1
    limit: int | None = 1500
    label: str = ""
    kill_every_s: float | None = None
    restart_s: float = 30.0

    @property
    def load(self) -> str:
        return self.label or f"{self.workload} x{self.rate:g}"

    @property
    def fleet(self) -> str:
        parts = [
            f"{self.num_prefill} prefill + {self.num_decode} decode" if self.num_prefill + self.num_decode else "",
            f"{self.num_both} both" if self.num_both else "",
            f"one {self.slow_worker:g}x slower" if self.slow_worker != 1 else "",
            f"{self.num_gateways} gateways" if self.num_gateways > 1 else "",
            f"a worker killed every {self.kill_every_s:g} s" if self.kill_every_s is not None else "",
        ]
        return ", ".join(filter(None, parts))


MATRIX: Final[Sequence[Case]] = (
    Case("conversation", 0.8, 8, 4, label="conversation, light (x0.8)"),
    Case("conversation", 1.25, 8, 4, label="conversation, near saturation (x1.25)"),
    Case("conversation", 1.6, 8, 4, label="conversation, beyond (x1.6)"),
    Case("conversation", 2.0, 8, 4, label="conversation, far beyond (x2)"),
    Case("conversation", 0.8, 0, 0, 12, label="conversation, light (x0.8)"),
    Case("conversation", 1.25, 0, 0, 12, label="conversation, near saturation (x1.25)"),
    Case("conversation", 1.6, 0, 0, 12, label="conversation, beyond (x1.6)"),
    Case("conversation", 2.0, 0, 0, 12, label="conversation, far beyond (x2)"),
    Case("conversation", 1.0, 8, 4, slow_worker=2.0, label="conversation x1"),
    Case("conversation", 1.25, 8, 4, num_gateways=2, label="conversation x1.25"),
    Case("shared_prefix", 1.0, 8, 8),
    Case("shared_prefix", 1.0, 0, 0, 16),
    Case("prefix_repetition", 1.0, 2, 2),
    Case("prefix_repetition", 1.0, 0, 0, 4),
    Case("agentic", 1.0, 6, 6),
    Case("agentic", 1.0, 0, 0, 12),
    Case("uniform", 1.0, 6, 2),
    Case("uniform", 1.0, 0, 0, 8),
    Case("tools", 1.0, 8, 4),
    Case("tools", 1.0, 0, 0, 12),
    Case("documents", 1.0, 8, 4),
    Case("documents", 1.0, 0, 0, 12),
    Case("bursts", 1.0, 6, 4),
    Case("bursts", 1.0, 0, 0, 10),
    Case("azure_2023_conversation", 10.5, 8, 4, label="Azure conversation, near saturation (x10.5)"),
    Case("azure_2023_conversation", 10.5, 0, 0, 12, label="Azure conversation, near saturation (x10.5)"),
    Case("conversation", 0.8, 8, 4, label="conversation, light (x0.8)", kill_every_s=60.0),
    Case("conversation", 0.8, 0, 0, 12, label="conversation, light (x0.8)", kill_every_s=60.0),
)
"""What `docs/routing.md` compares: four loads of the trace, generated loads, another trace, prefill and decode workers
beside workers that do both, a slow worker, two gateways, and workers that are killed. The first 1,500 sessions of each:
about 25 minutes on two cores.
"""

QUICK: Final[Sequence[Case]] = (
    Case("conversation", 1.25, 8, 4, limit=60),
    Case("conversation", 1.25, 0, 0, 12, limit=60),
    Case("uniform", 1.0, 6, 2, limit=60),
    Case("uniform", 1.0, 6, 2, limit=60, kill_every_s=5.0, restart_s=5.0),
)
"""The same in seconds: shows that everything runs, proves nothing."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all cases of one invocation share."""

    policies: Sequence[str]
    facts: EngineFacts
    seed: int
    slo: Slo
    like: LiveFleet | None = None
    """Whose workers to take; without it all are as `facts` says."""

    def run(self, cases: Sequence[Case], jobs: int = 1) -> list[Row]:
        progress = Progress(len(cases) * len(self.policies))
        if jobs > 1:
            return self._run_side_by_side(cases, jobs, progress)
        rows = []
        for case in cases:
            workload = self._workload(case)
            for policy in self.policies:
                on_progress = progress.start(f"{case.load}, {case.fleet}, {policy}")
                rows.append(self._row(case, policy, workload, on_progress))
                progress.end()
        return rows

    def _run_side_by_side(self, cases: Sequence[Case], jobs: int, progress: Progress) -> list[Row]:
        """The same rows from several processes; progress counts whole runs."""
        runs = [(case, policy) for case in cases for policy in self.policies]
        rows = []
        for (case, policy), row in zip(runs, each(self.one, runs, jobs), strict=True):
            rows.append(row)
            progress.start(f"{case.load}, {case.fleet}, {policy}")(1, 1)
            progress.end()
        return rows

    def one(self, run: tuple[Case, str]) -> Row:
        case, policy = run
        return self._row(case, policy, self._workload(case), lambda _ended, _all: None)

    def _workload(self, case: Case) -> Workload:
        facts = self.facts
        workload = load(case.workload, block_size=facts.block_size, seed=self.seed).scaled(case.rate)
        if case.limit is not None:
            workload = workload.limited(case.limit)
        check_fits(workload, facts)
        return workload

    def _row(self, case: Case, policy: str, workload: Workload, on_progress: Callable[[int, int], None]) -> Row:
        scenario = Scenario(
            policy=policy,
            num_prefill=case.num_prefill,
            num_decode=case.num_decode,
            num_both=case.num_both,
            facts=self.facts,
            slo_ttft_s=self.slo.ttft_s,
            slo_itl_s=self.slo.tpot_s,
            seed=self.seed,
            num_gateways=case.num_gateways,
            slow_worker=case.slow_worker,
            faults=Faults(kill_every_s=case.kill_every_s, restart_s=case.restart_s),
        )
        if self.like is not None:
            scenario = self.like.scenario(scenario)
        result = Simulation(scenario, workload, on_progress).run()
        calm_fleet = "" if case.kill_every_s is None else replace(case, kill_every_s=None).fleet
        return summarise(result, load=case.load, fleet=case.fleet, policy=policy, slo=self.slo, calm_fleet=calm_fleet)

    def report(self, cases: Sequence[Case], rows: list[Row]) -> Report:
        settings: dict[str, Any] = {
            "seed": self.seed,
            "policies": list(self.policies),
            "engine": msgspec.to_builtins(self.facts),
            "like": None if self.like is None else [msgspec.to_builtins(worker) for worker in self.like.workers],
            "cases": [msgspec.to_builtins(case) for case in cases],
        }
        return Report(settings, versions(), self.slo, rows)


def versions() -> dict[str, str]:
    """What a repetition should have too."""
    found = {"python": platform.python_version()}
    for name in ("headrace", "numpy", "msgspec"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
            found[name] = "checkout"
    return found


app = App(name="python -m loadtest.simulate", help="Compare routing policies on a simulated fleet.", version_flags=[])


_AT_LEAST_0: Final = Parameter(validator=Number(gte=0))
_TRACE: Final = "conversation"


@app.default
def main(
    *,
    trace: str | None = None,
    policies: Annotated[str, Parameter(help="names or module:Class, separated by commas")] = ",".join(POLICIES),
    prefill: Annotated[int, _AT_LEAST_0] = 0,
    decode: Annotated[int, _AT_LEAST_0] = 0,
    both: Annotated[int, _AT_LEAST_0] = 0,
    rate_scale: Annotated[tuple[float, ...], Parameter(consume_multiple=True), RATE] = (1.0,),
    limit: Annotated[int | None, AT_LEAST_1] = None,
    seed: int = 0,
    gateways: Annotated[int, AT_LEAST_1] = 1,
    slow_worker: Annotated[float, POSITIVE] = 1.0,
    kill_every: Annotated[float | None, POSITIVE] = None,
    restart: Annotated[float, POSITIVE] = 30.0,
    engine: EngineFlags = STANDARD,
    slo_ttft: Annotated[float, POSITIVE] = 5.0,
    slo_itl: Annotated[float, POSITIVE] = 0.05,
    json: Path | None = None,
    html: Path | None = None,
    matrix: Path | None = None,
    quick: bool = False,
    jobs: Annotated[int, AT_LEAST_1] = 1,
) -> None:
    """Run workloads through policies and print a table.

    Args:
        trace: a synthetic load (see `loadtest/workloads.py`), a trace's name, or its path; `conversation` if not given
        policies: which policies to compare
        prefill: prefill workers
        decode: decode workers
        both: workers that do both; 8 prefill and 4 decode workers when no worker is asked for,
            with --like as many as there are
        rate_scale: how many times as fast sessions start; several mean several loads
        limit: serve the first sessions only; with --matrix: of every case, 1,500 if not given
        seed: of arrivals, lengths and ties
        gateways: how many share the fleet; sessions take turns
        slow_worker: the first worker takes this many times as long, and nobody tells the router
        kill_every: seconds between two kills of a random worker; beside the same without kills
        restart: seconds until a killed worker is back, with an empty cache
        engine: of every worker
        slo_ttft: seconds until the first token that count as good; the routers are told
        slo_itl: mean seconds between a request's tokens that count as good; the routers are told
        json: write everything there
        html: write plots and one page (index.html) into this folder
        matrix: run the comparison of docs/routing.md and write it into this folder
        quick: with --matrix: a small one, in seconds; writes nothing unless --json or --html is given
        jobs: processes to share the runs
    """
    names = _names(policies)
    facts, live = engine.read()
    comparison = Comparison(names, facts, seed, Slo(slo_ttft, slo_itl), live)
    prefill, decode, both = _numbers(prefill, decode, both, live)
    if matrix is not None:
        check_unused("without --matrix", trace=trace)
        cases: Sequence[Case] = [_limited(case, limit) for case in (QUICK if quick else MATRIX)]
    else:
        check_unused("with --matrix", quick=quick or None)
        trace = _TRACE if trace is None else trace
        cases = [
            Case(
                trace,
                rate,
                prefill,
                decode,
                both,
                slow_worker,
                gateways,
                limit,
                _label(trace, rate),
                kill_every_s,
                restart,
            )
            for rate in rate_scale
            for kill_every_s in ((None,) if kill_every is None else (None, kill_every))
        ]
    if TRACE_BLOCK_SIZE % facts.block_size and any(case.workload not in GENERATORS for case in cases):
        raise UnusableSetting("block_size", facts.block_size, f"for a trace it must divide {TRACE_BLOCK_SIZE}")
    check_file("json", json)  # now rather than after an hour
    for setting, folder in (("html", html), ("matrix", None if quick else matrix)):
        check_plots(setting, folder)
        check_folder(setting, folder)
    try:
        for name in names:
            load_policy(name)  # a misspelt one fails now rather than after an hour
        rows = comparison.run(cases, jobs)
        print(table(rows))
        report = comparison.report(cases, rows)
        write(report, json=json, folder=html)
        if matrix is not None and not quick:
            write_docs(report, matrix)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def _names(policies: str) -> list[str]:
    """Raises:  UnusableSetting."""
    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise UnusableSetting(
            "policies", policies, f"at least one is needed, of {', '.join(POLICIES)} or a module:Class"
        )
    return names


def _numbers(prefill: int, decode: int, both: int, live: LiveFleet | None) -> tuple[int, int, int]:
    """Workers of each role: those asked for, else the live fleet's, else the usual.  Raises:  UnusableSetting."""
    if prefill + decode + both == 0:
        if live is None:
            return 8, 4, 0
        return live.count(Role.PREFILL), live.count(Role.DECODE), live.count(Role.BOTH)
    if not decode + both:
        raise UnusableSetting("prefill", prefill, "prefill workers alone cannot decode; add --decode or --both")
    return prefill, decode, both


def check_plots(setting: str, path: Path | None) -> None:
    """Whether plots could be drawn, if they are wanted there.  Raises:  UnusableSetting."""
    if path is None:
        return
    try:
        import loadtest.plots  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        cure = f"pip install {error.name}, or make simulate, which does so"
        raise UnusableSetting(setting, str(path), f"its plots need {error.name}: {cure}") from error


def _limited(case: Case, limit: int | None) -> Case:
    return case if limit is None else replace(case, limit=limit)


def _label(trace: str, rate: float) -> str:
    name = trace if trace in GENERATORS else Path(trace).name.split(".")[0]
    return f"{name} x{rate:g}"


def write_docs(report: Report, folder: Path) -> None:
    """Replace the results in `folder`/routing.md; plots go to `folder`/img, JSON and the page beside them."""
    target = folder / "routing.md"
    text = target.read_text() if target.exists() else f"# Routing rules compared\n\n{_BEGIN}\n{_END}\n"
    if _BEGIN not in text or _END not in text:
        raise SystemExit(f"{target} has lost its marks {_BEGIN} and {_END}; results go between them")
    from loadtest.plots import plots  # noqa: PLC0415 - matplotlib, which the tables do without

    images = plots(report.rows)
    (folder / "img").mkdir(exist_ok=True)
    for name, image in images.items():
        (folder / "img" / name).write_bytes(image)
    write(report, json=folder / "routing.json")
    pictures = "".join(f"\n![{name[:-4]}](img/{name})\n" for name in _docs_images(images))
    results = f"{_BEGIN}\n{markdown(report.rows)}{pictures}{_END}"
    target.write_text(re.sub(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", lambda _: results, text, flags=re.DOTALL))


def _docs_images(images: Iterable[str]) -> list[str]:
    return ["goodput.png", *(name for name in images if name != "goodput.png")]


if __name__ == "__main__":
    configure("error")
    sys.exit(run(app))
