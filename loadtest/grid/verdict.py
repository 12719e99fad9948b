"""Where `headrace` stands in each cell: how far ahead of the best other rule, or behind."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

from loadtest.report import OURS, Row
from loadtest.slo import Slo

NEAR: Final = 0.02
"""As good as the best: goodput, or throughput of a closed loop, at most this share below it."""
FAR: Final = 0.05
"""Further behind than this is never all right."""
STALLS: Final = 1.5
"""ITL p99 may be this many times another rule's; more only where goodput is higher for it."""
FEW: Final = 0.005
"""Share of all requests that decides nothing, whatever share of the best rule's goodput it is."""


class CellResult(msgspec.Struct, frozen=True):
    """A cell, and what each policy made of it."""

    name: str
    title: str
    values: dict[str, Any]
    """Value by axis; empty for a named regime."""
    is_closed: bool
    slo: Slo
    capacity_per_s: float | None
    """Estimated, requests/s."""
    rows: list[Row]
    cpu_s: dict[str, float]
    """By policy: CPU seconds of its simulation."""

    def row(self, policy: str) -> Row:
        """Raises:  ValueError if it was not among those compared."""
        for row in self.rows:
            if row.policy == policy:
                return row
        raise ValueError(
            f"cell {self.name} was not served with {policy}; there are {[row.policy for row in self.rows]}"
        )


class Verdict(msgspec.Struct, frozen=True):
    """Leads are shares of the best other rule's figure: 0.05 is 5 % ahead, -0.05 behind; None without one."""

    name: str
    goodput_lead: float
    throughput_lead: float | None
    """In a closed loop; elsewhere arrivals set it."""
    itl_ratio: float | None
    """ITL p99 over the least of the rules with as much goodput; None if there is none."""
    losses: list[str]
    """Of `goodput`, `throughput` and `ITL`: in which it is behind by more than it may."""

    @property
    def lead(self) -> float:
        """The one figure of a cell: what counts there, the worse where both do."""
        return self.goodput_lead if self.throughput_lead is None else min(self.goodput_lead, self.throughput_lead)


def verdict(cell: CellResult) -> Verdict:
    """How `headrace` fares against the best other rule of each kind."""
    ours, others = cell.row(OURS), [row for row in cell.rows if row.policy != OURS]
    goodput, throughput = (_lead(of, ours, others) for of in (_goodput, _throughput))
    losses = []
    missed = max(map(_goodput, others)) - _goodput(ours)
    if goodput < -NEAR and missed > FEW:
        losses.append("goodput")
    if cell.is_closed and throughput < -NEAR:
        losses.append("throughput")
    calmest = _calmest(ours, others)
    ratio = (ours.itl_p99_s or 0.0) / calmest.itl_p99_s if calmest is not None and calmest.itl_p99_s else None
    if ratio is not None and ratio > STALLS:
        losses.append("ITL")
    return Verdict(cell.name, goodput, throughput if cell.is_closed else None, ratio, losses)


def _calmest(ours: Row, others: Sequence[Row]) -> Row | None:
    """Of the rules with as much goodput the one with the least ITL p99."""
    level = [row for row in others if row.itl_p99_s and row.goodput_share >= ours.goodput_share - FEW]
    return min(level, key=lambda row: row.itl_p99_s or 0.0, default=None)


def _goodput(row: Row) -> float:
    return row.goodput_share


def _throughput(row: Row) -> float:
    return row.requests_per_s


def _lead(figure: Callable[[Row], float], ours: Row, others: Sequence[Row]) -> float:
    best = max(map(figure, others))
    if not best:
        return 1.0 if figure(ours) else 0.0
    return figure(ours) / best - 1


# --- for a terminal --------------------------------------------------------------------------------------------------


def table(cells: Sequence[CellResult]) -> str:
    """The losses first, the worst of them on top; then what they are losses of."""
    verdicts = {cell.name: verdict(cell) for cell in cells}
    lost = sorted((cell for cell in cells if verdicts[cell.name].losses), key=lambda cell: verdicts[cell.name].lead)
    lines = [f"{OURS} is behind in {len(lost)} of {len(cells)} cells", ""]
    for cell in lost:
        lines += _loss(cell, verdicts[cell.name])
    return "\n".join([*lines, *_summary(cells, list(verdicts.values()))])


def _loss(cell: CellResult, found: Verdict) -> list[str]:
    ours, others = cell.row(OURS), [row for row in cell.rows if row.policy != OURS]
    by_goodput = max(others, key=_goodput)
    shown = [ours, by_goodput]
    if cell.is_closed:
        shown.append(max(others, key=_throughput))
    if "ITL" in found.losses and (calmest := _calmest(ours, others)) is not None:
        shown.append(calmest)
    head = f"{', '.join(found.losses)}: cell {cell.name}" + (f" ({cell.title})" if cell.values else "")
    slo = f"  SLO {cell.slo.ttft_s:.2f} s, {cell.slo.tpot_s * 1e3:.0f} ms; {ours.num_requests} requests"
    return [head, slo, *(f"  {_figures(row)}" for row in {row.policy: row for row in shown}.values())]


def _figures(row: Row) -> str:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.1f}"

    return (
        f"{row.policy:<16} goodput {row.goodput_share * 100:5.1f} %  {row.requests_per_s:9.3f}/s "
        f"{row.tokens_per_s:9.0f} tokens/s  TTFT mean {row.ttft_mean_s or 0:7.3f} p50 {row.ttft_p50_s or 0:7.3f} "
        f"p99 {row.ttft_p99_s or 0:7.3f} s  ITL p99 {ms(row.itl_p99_s):>6} TPOT p99 {ms(row.tpot_p99_s):>6} ms"
    )


def _summary(cells: Sequence[CellResult], verdicts: Sequence[Verdict]) -> list[str]:
    closed = [found for found in verdicts if found.throughput_lead is not None]
    lines = [
        "",
        _share("goodput", [(found.goodput_lead, found.name) for found in verdicts], "goodput", verdicts),
    ]
    if closed:
        leads = [(found.throughput_lead or 0.0, found.name) for found in closed]
        lines.append(_share("throughput in a closed loop", leads, "throughput", closed))
    judged = [found for found in verdicts if found.itl_ratio is not None]
    if judged:
        kept = sum("ITL" not in found.losses for found in judged)
        lines.append(
            f"ITL p99 within {STALLS:g} x the least of a rule with as much goodput: {kept} of {len(judged)} cells "
            f"({kept / len(judged):.1%})"
        )
    lines += ["", *_by_policy(cells)]
    return lines


def _share(what: str, leads: Sequence[tuple[float, str]], loss: str, verdicts: Sequence[Verdict]) -> str:
    near = sum(loss not in found.losses for found in verdicts)
    worst, where = min(leads)
    return (
        f"{what}: first or within {NEAR:.0%} of the best other rule in {near} of {len(leads)} cells "
        f"({near / len(leads):.1%}); ahead by more than that in {sum(lead > NEAR for lead, _ in leads)}, "
        f"behind by more than {FAR:.0%} in {sum(lead < -FAR for lead, _ in leads)}; "
        f"worst {worst:+.1%} (cell {where})"
    )


def _by_policy(cells: Sequence[CellResult]) -> Iterable[str]:
    yield f"{'policy':<16} goodput mean  first or near it  CPU s"
    best = {cell.name: max(map(_goodput, cell.rows)) for cell in cells}
    for policy in [row.policy for row in cells[0].rows]:
        shares = [(cell.row(policy).goodput_share, best[cell.name]) for cell in cells]
        near = sum(share >= (1 - NEAR) * most for share, most in shares)
        cpu_s = sum(cell.cpu_s[policy] for cell in cells)
        mean = statistics.fmean(share for share, _ in shares)
        yield f"{policy:<16} {mean:11.1%}  {near / len(cells):16.1%}  {cpu_s:5.0f}"
