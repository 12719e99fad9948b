"""docs/performance.md from what `make bench`, `bench-peers`, `bench-since` and `bench-disagg` measured.

    make performance
    python -m loadtest.performance [--measured build/bench]

What is measured anew replaces its part of docs/performance.json; the page is written from that file alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import App, Parameter

from loadtest import bench, disagg, since
from loadtest.machine import Circumstances
from loadtest.peers import table as peers
from loadtest.peers.gateways import BASE, headrace_name
from loadtest.peers.measure import NEW, PER_REQUEST, PER_TOKEN, SHARED
from loadtest.written import grid

DOCS: Final = Path(__file__).parents[1] / "docs"
DATA, PAGE = DOCS / "performance.json", DOCS / "performance.md"
PARTS: Final = ("bench", "peers", "since", "disagg")
_OURS, _DYNAMO = headrace_name("headrace"), "Dynamo 1.6.1"
app = App(help=__doc__, version_flags=[])


@dataclass(frozen=True, slots=True)
class Target:
    """One row of the budget. value: None, it was not measured.  limit: the most it may be, the least if `is_floor`."""

    what: str
    value: float | None
    limit: float
    unit: str
    is_floor: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "reached" if (self.value >= self.limit if self.is_floor else self.value <= self.limit) else "missed"


@app.default
def main(
    *, measured: Annotated[Path, Parameter(help="Where the JSON of the measurements lies.")] = Path("build/bench")
) -> None:
    """Take in what was measured and write the page."""
    data: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {}
    for part in PARTS:
        path = measured / f"{part}.json"
        if path.exists():
            data[part] = json.loads(path.read_text())
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))
    print(f"written: {DATA}, {PAGE}")


def page(data: dict[str, Any]) -> str:
    """Markdown of what docs/performance.json holds."""
    sections = [_HEAD, f"## The budget\n\n{_BUDGET}\n\n{_budget_table(data)}"]
    for part, title, tables in (
        ("peers", "Beside other gateways", peers.tables),
        ("bench", "Headrace alone", bench.tables),
        ("since", "Beside itself at an earlier commit", since.tables),
        ("disagg", "Real vLLM, disaggregated and plain", disagg.tables),
    ):
        if part in data:
            where = Circumstances(**data[part]["circumstances"])
            sections.append("\n\n".join([f"## {title}", f"`{_TARGETS[part]}`. {where}.", *tables(data[part])]))
    return "\n\n".join(sections) + "\n"


_HEAD: Final = """# Performance

Written by `make performance` from `docs/performance.json`; do not edit. Each section says where and when it was
measured, and what else the machine did (its load when the run began). Within a section everything was measured in one
run, the variants in turn: ratios hold, absolute figures are of that machine. Load, workers and gateway share it."""
_BUDGET: Final = (
    "Ratios of CPU are medians of the rounds' ratios, policy `headrace`, which tokenizes and routes exactly."
)
_TARGETS: Final = {
    "peers": "make bench-peers",
    "bench": "make bench",
    "since": "make bench-since",
    "disagg": "make bench-disagg",
}


def budget(data: dict[str, Any]) -> list[Target]:
    """Every row, whatever was measured."""
    found = data.get("peers", {"gateways": {}})
    costs = [
        ("per token all in, 256 streams of 64", PER_TOKEN, BASE, 0.6),
        ("per request, short prompt", PER_REQUEST, BASE, 1.2),
        ("per request, short prompt", PER_REQUEST, _DYNAMO, 0.35),
        ("8k prompt, all shared", SHARED, BASE, 1.2),
        ("8k prompt, all shared", SHARED, _DYNAMO, 0.15),
        ("8k prompt, all new", NEW, BASE, 1.2),
        ("8k prompt, all new", NEW, _DYNAMO, 0.15),
    ]
    rows = [Target(what, peers.ratio(found, _OURS, base, case), most, f"x {base}") for what, case, base, most in costs]
    rows.append(Target("memory of the gateway", _memory_ratio(found), 1.1, f"x {BASE}"))
    for point, limit in (("p50", 1.0), ("p99", 3.0)):
        rows.append(Target(f"TTFT added at one client, {point}", peers.added_ms(found, _OURS, point), limit, "ms"))
    rows.append(Target("gap between tokens at 2,000 streams, p99", _gap_ratio(data), 1.2, "x the workers' own"))
    rows.append(_throughput(data.get("since", {"commit": "an earlier commit", "gateways": {}})))
    parts = data.get("bench", {}).get("parts", {})
    handover = parts.get("handover, times NIXL's bare calls")
    rows.append(Target("handover bandwidth", handover, 0.8, "x NIXL's bare calls", is_floor=True))
    return rows


def _throughput(found: dict[str, Any]) -> Target:
    """The commit is the one at which the budget was made."""
    times = peers.ratio(found, since.NOW, found["commit"], since.THROUGHPUT, "requests_per_s")
    return Target(f"requests a second, {since.THROUGHPUT}", times, 2.0, f"x {found['commit']}", is_floor=True)


def _memory_ratio(found: dict[str, Any]) -> float | None:
    sizes = [found["gateways"].get(name, {}).get("memory_mb", {}).get("rss") for name in (_OURS, BASE)]
    return sizes[0] / sizes[1] if all(sizes) else None


def _gap_ratio(data: dict[str, Any]) -> float | None:
    opened = [each for each in data.get("bench", {}).get("open_streams", []) if each["count"] == 2000]
    return opened[0]["gap_ms"][1] / opened[0]["gap_alone_ms"][1] if opened else None


def _budget_table(data: dict[str, Any]) -> str:
    lines = []
    for row in budget(data):
        bound = f"{'at least' if row.is_floor else 'at most'} {row.limit:g} {row.unit}"
        figure = "-" if row.value is None else f"{row.value:.2f} {row.unit}"
        lines.append([row.what, bound, figure, row.verdict])
    return grid(["what", "target", "measured", ""], lines)


if __name__ == "__main__":
    app()
