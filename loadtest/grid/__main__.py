"""Compare policies in a sample of regimes: `python -m loadtest.grid --help`."""

import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number

from loadtest import report
from loadtest.grid.axes import AXES, Cell, sample, wanted
from loadtest.grid.loads import Setup, setup
from loadtest.grid.named import NAMED
from loadtest.grid.verdict import CellResult, table, verdict
from loadtest.progress import Progress, each
from loadtest.report import OURS, summarise
from loadtest.simulate import check_plots, versions
from loadtest.simulator.simulation import Simulation
from loadtest.written import check_folder
from planes.wire.errors import UnusableSetting
from process.logging import configure
from process.settings import run
from router.policies import load_policy

COMPARED: Final = (OURS, "least_loaded", "dynamo", "infera", "llmd", "mooncake", "llmd_predicted", "power_of_two")
QUICK: Final = (OURS, "least_loaded", "dynamo", "mooncake")
_QUICK_CELLS: Final = 40


@dataclass(frozen=True, slots=True)
class Grid:
    """What all cells of one invocation share."""

    policies: Sequence[str]
    seed: int

    @property
    def is_compared(self) -> bool:
        """Whether there is a rule to be ahead of, or behind."""
        return OURS in self.policies and len(self.policies) > 1

    def run(self, cells: Sequence[Cell | str], jobs: int) -> list[CellResult]:
        progress = Progress(len(cells))
        results = []
        for result in each(self.serve, cells, jobs):
            results.append(result)
            losses = ", ".join(verdict(result).losses) if self.is_compared else ""
            progress.start(f"cell {result.name}{': behind in ' if losses else ''}{losses}")(1, 1)
            progress.end()
        return results

    def serve(self, cell: Cell | str) -> CellResult:
        """One cell, or the regime of that name, with every policy."""
        drawn = NAMED[cell](self.seed) if isinstance(cell, str) else setup(cell, self.seed)
        rows, cpu_s = [], {}
        for policy in self.policies:
            begun = time.process_time()
            rows.append(self._row(drawn, policy))
            cpu_s[policy] = time.process_time() - begun
        return CellResult(
            name=drawn.name,
            title=drawn.title,
            values=drawn.values,
            is_closed=drawn.workload.num_clients is not None,
            slo=drawn.slo,
            capacity_per_s=None if drawn.estimate is None else drawn.estimate.requests_per_s,
            rows=rows,
            cpu_s=cpu_s,
        )

    def _row(self, drawn: Setup, policy: str) -> report.Row:
        slo = drawn.slo
        scenario = replace(drawn.scenario, policy=policy, slo_ttft_s=slo.ttft_s, slo_itl_s=slo.tpot_s)
        result = Simulation(scenario, drawn.workload).run()
        row = summarise(result, load=f"cell {drawn.name}", fleet=drawn.title, policy=policy, slo=slo)
        return msgspec.structs.replace(row, ttft_quantiles_s=[])


class GridReport(msgspec.Struct, frozen=True):
    """Everything that is needed to repeat a grid, and what came out."""

    settings: dict[str, Any]
    versions: dict[str, str]
    cells: list[CellResult]


app = App(name="python -m loadtest.grid", help="Compare routing policies in a sample of regimes.", version_flags=[])

_AT_LEAST_1: Final = Parameter(validator=Number(gte=1, lt=math.inf))


@app.default
def main(
    *,
    policies: Annotated[str, Parameter(help="names or module:Class, separated by commas")] = "",
    num_cells: Annotated[int, _AT_LEAST_1] = 300,
    cells: str | None = None,
    only: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    jobs: Annotated[int, _AT_LEAST_1] = 1,
) -> None:
    """Serve a sample of cells, and the named regimes, with several policies; print where headrace is behind.

    Args:
        policies: which to compare; headrace and seven others if not given
        num_cells: of the sample; a smaller one is the beginning of a larger one
        cells: only these, numbers and names separated by commas, each with all its figures
        only: of the sample the cells with this value of an axis, axis=value; several must all hold
        seed: of the sample and of all that is drawn in it
        quick: the first 40 cells with four policies, in two minutes
        out: write grid.json, grid.txt and grid.png into this folder
        jobs: processes to share the cells
    """
    names = [name.strip() for name in policies.split(",") if name.strip()] or list(QUICK if quick else COMPARED)
    for name in names:
        try:
            load_policy(name)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    check_plots("out", out)
    check_folder("out", out)
    picked = [name.strip() for name in (cells or "").split(",") if name.strip()]
    if cells is not None and not picked:
        raise UnusableSetting("cells", cells, f"at least one is needed, a number or one of {', '.join(NAMED)}")
    chosen = (
        _picked(picked, seed) if picked else _sampled(_QUICK_CELLS if quick else num_cells, seed, only, quick=quick)
    )
    grid = Grid(names, seed)
    results = grid.run(chosen, jobs)
    if picked or not grid.is_compared:
        print(report.table([row for result in results for row in result.rows]))
    text = table(results) if grid.is_compared else ""
    if text:
        print(f"\n{text}")
    if out is not None:
        settings = {"seed": seed, "policies": names, "axes": dict(AXES)}
        _write(out, GridReport(settings, versions(), results), text)


def _picked(names: Iterable[str], seed: int) -> list[Cell | str]:
    """Raises:  UnusableSetting."""
    chosen: list[Cell | str] = []
    for name in names:
        if name not in NAMED and not name.isdecimal():
            raise UnusableSetting("cells", name, f"a cell is a number, or one of {', '.join(NAMED)}")
        chosen.append(name if name in NAMED else sample(int(name) + 1, seed)[-1])
    return chosen


def _sampled(count: int, seed: int, only: Iterable[str], *, quick: bool) -> list[Cell | str]:
    """Raises:  UnusableSetting."""
    try:
        filters = [wanted(text) for text in only]
    except ValueError as error:
        raise UnusableSetting("only", " ".join(only), str(error)) from error
    cells = sample(count, seed)
    chosen: list[Cell | str] = [
        cell for cell in cells if all(str(cell.values[axis]) == value for axis, value in filters)
    ]
    if not chosen:
        raise UnusableSetting("only", " ".join(only), f"none of the {count} cells has all of that; raise --num-cells")
    return chosen if filters or quick else [*chosen, *NAMED]


def _write(folder: Path, found: GridReport, text: str) -> None:
    from loadtest.plots import heat_map  # noqa: PLC0415 - matplotlib, which the tables do without

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grid.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    if text:
        (folder / "grid.txt").write_text(f"{text}\n")
        (folder / "grid.png").write_bytes(heat_map(found.cells))


if __name__ == "__main__":
    configure("error")
    sys.exit(run(app))
