"""A day of load on one fleet, with roles that stay and with `--autorole`: `python -m loadtest.day --help`.

An hour passes in 40 s. Documents are asked about in the morning (prompts of 8,000 tokens, answers of 40, most at
ten), chats are held in the evening (600 and 1,000, most at eight), some of either at any time. `--autorole` looks at
5 s and plans for 50 s, a twelfth of its own settings: for it too the day goes by 7.5 times faster than it is made for,
and what drains take is not compressed at all.
"""

import itertools
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number

from loadtest.engine_flags import AT_LEAST_1, STANDARD, EngineFlags
from loadtest.progress import Progress, each
from loadtest.report import is_good, quantile
from loadtest.simulator.autorole import SimulatedAutorole
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.simulation import Simulation
from loadtest.slo import Slo
from loadtest.workloads import Session, Turn, Workload, lognormal, poisson, segment_names
from loadtest.written import check_file
from planes.wire.messages import EngineFacts
from process.logging import configure
from process.settings import run
from router.roles import RoleGoals

HOURS: Final = 24
_GOALS: Final = RoleGoals(window_s=5.0, horizon_s=50.0)
_SIGMA: Final = 0.5


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind: lengths about their means, and how many a second at what hour."""

    prompt_tokens: int
    answer_tokens: int
    most_per_s: float
    peak_hour: float
    half_width_hours: float = 5.0
    base_share: float = 0.1

    def rate(self, hour: float) -> float:
        """Requests a second: a hill about the peak, on a plain."""
        away = abs((hour - self.peak_hour + HOURS / 2) % HOURS - HOURS / 2)
        hill = math.cos(math.pi / 2 * away / self.half_width_hours) ** 2 if away < self.half_width_hours else 0.0
        return self.most_per_s * (self.base_share + (1 - self.base_share) * hill)


def day(hour_s: float, load: float, *, block_size: int, seed: int) -> Workload:
    """load: of the most that eight workers bear, roughly."""
    kinds = (Kind(8000, 40, 6.0 * load, 10.0), Kind(600, 1000, 20.0 * load, 20.0))
    rng, numbers = random.Random(seed), itertools.count()
    sessions = [
        Session(at, (_turn(kind, next(numbers), rng, block_size),))
        for kind in kinds
        for at in _starts(kind, rng, hour_s)
    ]
    return Workload("a day", block_size, tuple(sorted(sessions, key=lambda session: session.start_s)))


def _starts(kind: Kind, rng: random.Random, hour_s: float) -> Iterator[float]:
    return poisson(rng, HOURS * hour_s, lambda now: kind.rate(now / hour_s), kind.most_per_s)


def _turn(kind: Kind, number: int, rng: random.Random, block_size: int) -> Turn:
    prompt, answer = (
        lognormal(rng, mean * math.exp(-(_SIGMA**2) / 2), _SIGMA, 4 * mean)
        for mean in (kind.prompt_tokens, kind.answer_tokens)
    )
    return Turn(0.0, prompt, answer, segment_names([(number, prompt)], block_size))


class DayRow(msgspec.Struct, frozen=True):
    """One fleet's day."""

    fleet: str
    goodput: float
    """Share within both SLOs, of the day, …"""
    morning: float
    """… of what was sent from 8 to 12 …"""
    evening: float
    """… and from 18 to 22."""
    ttft_p99_s: float
    itl_p99_s: float
    busy_worker_s: float
    all_worker_s: float
    spare_worker_s: float
    """That could have been given back, by the formula."""
    num_changes: int
    changes: list[str]


@dataclass(frozen=True, slots=True)
class Day:
    """What all fleets share."""

    facts: EngineFacts
    hour_s: float
    load: float
    slo: Slo
    seed: int

    def row(self, fleet: tuple[int, int, int, bool]) -> DayRow:
        """Prefill workers, decode workers, workers that do both, and whether roles follow the load."""
        num_prefill, num_decode, num_both, is_auto = fleet
        slo = self.slo
        scenario = Scenario(
            "headrace",
            num_prefill,
            num_decode,
            num_both,
            facts=self.facts,
            slo_ttft_s=slo.ttft_s,
            slo_itl_s=slo.tpot_s,
            seed=self.seed,
        )
        workload = day(self.hour_s, self.load, block_size=self.facts.block_size, seed=self.seed)
        simulation = Simulation(scenario, workload)
        autorole = SimulatedAutorole(simulation, _GOALS, is_acting=is_auto)
        result = simulation.run()

        def share(first: float, last: float) -> float:
            sent = [each for each in result.records if first <= each.sent_at / self.hour_s < last]
            return sum(is_good(each, slo) for each in sent) / max(1, len(sent))

        ttfts = sorted(math.inf if each.ttft_s is None else each.ttft_s for each in result.records)
        itls = sorted(each.tpot_s for each in result.records if each.tpot_s is not None)
        return DayRow(
            fleet=_name(num_prefill, num_decode, num_both, is_auto=is_auto),
            goodput=share(0, HOURS),
            morning=share(8, 12),
            evening=share(18, 22),
            ttft_p99_s=quantile(ttfts, 0.99) or 0.0,
            itl_p99_s=quantile(itls, 0.99) or 0.0,
            busy_worker_s=sum(worker.busy_s for worker in result.workers),
            all_worker_s=len(result.workers) * result.duration_s,
            spare_worker_s=autorole.spare_s,
            num_changes=len(autorole.changes),
            changes=[
                f"{each.at_s / self.hour_s:05.2f} h: {each.worker} to {each.role}: {each.reason}"
                for each in autorole.changes
            ],
        )


def _name(prefill: int, decode: int, both: int, *, is_auto: bool) -> str:
    parts = [f"{count} {role}" for count, role in ((prefill, "prefill"), (decode, "decode"), (both, "both")) if count]
    return " + ".join(parts) + (", autorole" if is_auto else "")


def table(rows: list[DayRow]) -> str:
    """Markdown."""
    head = (
        "| fleet | within SLO % | 8 to 12 h | 18 to 22 h | TTFT p99 s | ITL p99 ms | busy worker-s "
        "| could be given back | changes |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    return head + "".join(
        f"| {row.fleet} | {100 * row.goodput:.1f} | {100 * row.morning:.1f} | {100 * row.evening:.1f} "
        f"| {row.ttft_p99_s:.2f} | {1000 * row.itl_p99_s:.1f} | {row.busy_worker_s:.0f} of {row.all_worker_s:.0f} "
        f"| {row.spare_worker_s:.0f} | {row.num_changes} |\n"
        for row in rows
    )


FLEETS: Final = (
    (0, 0, 8, False),
    (2, 6, 0, False),
    (4, 4, 0, False),
    (6, 2, 0, False),
    (2, 0, 6, False),
    (4, 0, 4, False),
    (6, 0, 2, False),
    (0, 0, 8, True),
)
"""Prefill, decode, both; the last one's roles follow the load."""

app = App(name="python -m loadtest.day", help="A day of load, with fixed roles and with --autorole.", version_flags=[])

_POSITIVE: Final = Parameter(validator=Number(gt=0))


@app.default
def main(
    *,
    hour_s: Annotated[float, _POSITIVE] = 40.0,
    load: Annotated[float, _POSITIVE] = 1.0,
    slo_ttft: Annotated[float, _POSITIVE] = 3.0,
    slo_itl: Annotated[float, _POSITIVE] = 0.025,
    seed: int = 0,
    jobs: Annotated[int, AT_LEAST_1] = 1,
    engine: EngineFlags = STANDARD,
    json: Path | None = None,
) -> None:
    """Serve the day with each fleet and print a table, and every change of a role.

    Args:
        hour_s: seconds in which an hour passes
        load: times as many requests
        slo_ttft: seconds until the first token that count as good
        slo_itl: mean seconds between a request's tokens that count as good
        seed: of arrivals and lengths
        jobs: processes to share the fleets
        engine: of every worker
        json: write everything there
    """
    facts, _ = engine.read()
    check_file("json", json)
    comparison = Day(facts, hour_s, load, Slo(slo_ttft, slo_itl), seed)
    progress, rows = Progress(len(FLEETS)), []
    for row in each(comparison.row, FLEETS, jobs):
        progress.start(row.fleet)(1, 1)
        progress.end()
        rows.append(row)
    print(table(rows))
    print("\n".join(change for row in rows for change in row.changes))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))


if __name__ == "__main__":
    configure("error")
    sys.exit(run(app))
