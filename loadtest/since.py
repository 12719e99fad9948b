"""`make bench-since COMMIT=f066e5b`: what Headrace gains and costs beside itself at an earlier commit, in one run.

    python -m loadtest.since COMMIT [--rounds 6] [--seconds 3] [--out build/bench]

The commit is installed under build/since, once. Both run side by side before simulated workers of their own, and are
loaded in turn: ratios hold, absolute figures are of this machine.
"""

import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import uvloop
from cyclopts import App, Parameter

from loadtest.closed_loop import Row, Shape
from loadtest.machine import circumstances
from loadtest.peers.measure import COSTS, PER_REQUEST, PER_TOKEN, STEPS, rounds_of
from loadtest.peers.running import Fleet, demo_model, headrace
from loadtest.peers.table import ratio, spread, values
from loadtest.written import check_folder, grid, write

app = App(help=__doc__, version_flags=[])

THROUGHPUT: Final = "256 clients, 1 token"
CASES: Final = {
    THROUGHPUT: Shape(256, 200, 1),
    PER_REQUEST: COSTS[PER_REQUEST],
    PER_TOKEN: COSTS[PER_TOKEN],
}
NOW: Final = "now"
_BUILT: Final = Path("build/since")


@app.default
def main(
    commit: str,
    *,
    rounds: Annotated[int, Parameter(help="How often each case is run through each.")] = 6,
    seconds: Annotated[float, Parameter(help="Length of one such run.")] = 3.0,
    out: Annotated[Path, Parameter(help="Where since.json and since.md are written.")] = Path("build/bench"),
) -> None:
    """Install, start both, load in turn, print and write the table."""
    earlier = installed(commit)
    check_folder("out", out)
    where = circumstances()
    rows = uvloop.run(_measure(earlier, rounds, seconds))
    result = {
        "circumstances": asdict(where),
        "commit": earlier.commit,
        "gateways": {
            which: {"rows": {case: [asdict(row) for row in found] for case, found in cases.items()}}
            for which, cases in rows.items()
        },
    }
    write(out, "since", result, [f"{where}.", *tables(result)])


@dataclass(frozen=True, slots=True)
class Installed:
    """An installation of a commit. wheel: unpacked, with the router compiled where that commit compiles it."""

    commit: str
    python: str
    wheel: Path


def installed(commit: str) -> Installed:
    """By the commit's own `make install`, with what it depends on.  Raises:  SystemExit with what was said."""
    name = _said("git", "rev-parse", "--verify", "--short", f"{commit}^{{commit}}")
    folder = (_BUILT / name).resolve()
    found = Installed(name, str(folder / ".venv/bin/python"), folder / "build/wheel")
    if not found.wheel.exists():
        print(f"installing {name} into {folder} (minutes) …", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        packed = folder / "build/packed"
        _said("git", "archive", "-o", str(folder / "sources.tar"), name)
        shutil.unpack_archive(folder / "sources.tar", folder)
        _said("make", "-C", str(folder), "install", "EXTRA=sim", f"PYTHON={sys.executable}")
        _said(found.python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(packed), str(folder))
        shutil.unpack_archive(next(packed.glob("*.whl")), found.wheel, "zip")
    return found


def _said(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv[:3])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


async def _measure(earlier: Installed, rounds: int, seconds: float) -> dict[str, dict[str, list[Row]]]:
    """Rows by which of the two, and case."""
    model = demo_model()
    fleet = Fleet(STEPS | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(earlier.wheel)}, model)
    async with (
        headrace("headrace", fleet, earlier.python) as before,
        headrace("headrace", Fleet(STEPS, model)) as now,
    ):
        both = [replace(before, name=earlier.commit), replace(now, name=NOW)]
        return await rounds_of(both, CASES, seconds=seconds, rounds=rounds)


def tables(result: dict[str, Any]) -> list[str]:
    """Markdown of what `since.json` holds."""
    lines = [
        [what, *(spread(values(result, which, case, field)) for which in (result["commit"], NOW)), f"{times:.2f}"]
        for what, case, field in (
            (f"requests a second, {THROUGHPUT}, all processes on these cores", THROUGHPUT, "requests_per_s"),
            ("µs of the gateway's CPU per request, 64 clients, 1 token", PER_REQUEST, "cpu_us"),
            ("µs of the gateway's CPU per token, 256 streams of 64 tokens", PER_TOKEN, "cpu_us"),
        )
        if (times := ratio(result, NOW, result["commit"], case, field)) is not None
    ]
    head = ["median (least to most of the rounds)", result["commit"], NOW, "median of the rounds' ratios"]
    return [grid(head, lines)]


if __name__ == "__main__":
    app()
