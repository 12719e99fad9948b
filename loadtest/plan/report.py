"""What a plan found: a table, sentences, JSON."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from loadtest.plan.search import cheapest
from loadtest.plan.trial import SURELY, Trial
from loadtest.slo import Slo

_SHORT = 0.6
"""Demand over supply from which on a resource is short: arrivals are not even."""


class Plan(msgspec.Struct, frozen=True):
    """Everything that is needed to repeat a plan, and what came out. trials: by workers, those that do both first."""

    load: str
    requests_per_s: float
    num_requests: int
    slo: Slo
    alone_p99_s: float
    """What a prompt of p99's length takes on an idle worker, nothing cached …"""
    empty_step_s: float
    """… and a decode step without sequences."""
    trials: list[Trial]
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def both(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.fleet.num_both]

    @property
    def split(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.fleet.num_both]

    @property
    def best(self) -> Trial | None:
        return cheapest(self.trials)


def in_order(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda each: (not each.fleet.num_both, each.fleet.workers, each.fleet.num_prefill))


def table(plan: Plan) -> str:
    """A line an alternative; the plan's and the cheapest of the other kind are marked."""
    head = ("", "fleet", "workers", "within SLO", "TTFT p99 s", "ITL p99 ms", "misses by", "prefill", "decode")
    cells = [[*head, "KV memory", "link", "short of"]]
    marks = {cheapest(plan.both): "+", cheapest(plan.split): "+", plan.best: "*"}
    for trial in plan.trials:
        shares = trial.pressure
        cells.append(
            [
                marks.get(trial, ""),
                str(trial.fleet),
                str(trial.fleet.workers),
                f"{'<' if trial.is_cut else ''}{trial.attainment:.1%}",
                _least(trial, trial.ttft_p99_s, ".2f"),
                _least(trial, trial.itl_p99_s * 1e3, ".1f"),
                "" if trial.holds else missed(trial),
                *(f"{each:.0%}" for each in (shares.prefill, shares.decode, shares.kv_memory, shares.handover)),
                shares.bottleneck,
            ]
        )
    widths = [max(len(line[index]) for line in cells) for index in range(len(cells[0]))]
    slo = f"first token {plan.slo.ttft_s:g} s, between tokens {plan.slo.tpot_s * 1e3:g} ms"
    load = f"{plan.load}: {plan.requests_per_s:.2f} requests/s, {plan.num_requests} requests"
    lines = [f"{load}; SLO at p99: {slo}", ""]
    for line in cells:
        texts = [
            text.ljust(width) if index in {0, 1, 6, 11} else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(texts).rstrip())
    told = "* the plan   + the fewest of the other kind   shares are demand over supply"
    if any(trial.is_cut for trial in plan.trials):
        told += f"   > at least: not tried to the end, since {SURELY:g} times the SLO was sure"
    lines += ["", told]
    return "\n".join(lines)


def missed(trial: Trial) -> str:
    """`TTFT x1.8`: by which of three, and how many times what is allowed it takes."""
    misses = {"TTFT": trial.ttft_miss, "ITL": trial.itl_miss, "load": trial.load}
    what = max(misses, key=misses.__getitem__)
    return f"{what} {'>' if trial.is_cut else ''}x{_times(trial.miss)}"


def _times(miss: float) -> str:
    """How many times what is allowed; what misses is never told as 1.00."""
    return _number(math.ceil(miss * 100) / 100 if math.isfinite(miss) else math.inf, ".2f")


def _least(trial: Trial, value: float, form: str) -> str:
    """A time of a trial that may have been cut."""
    return f"{'>' if trial.is_cut and value else ''}{_number(value, form)}"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "never"


def explained(plan: Plan) -> Iterator[str]:
    """The reasons, a sentence or two each."""
    best = plan.best
    if best is None:
        yield from _unreachable(plan)
        return
    yield (
        f"{best.fleet} hold the SLO: p99 TTFT {best.ttft_p99_s:.2f} of {plan.slo.ttft_s:g} s, p99 ITL "
        f"{best.itl_p99_s * 1e3:.1f} of {plan.slo.tpot_s * 1e3:g} ms, {best.attainment:.1%} of the requests within "
        "both."
    )
    yield _worth(plan, best)
    for trial in _just_short(plan):
        yield f"{trial.fleet} miss it: {_why(trial)}"
    yield f"The next bottleneck is {best.pressure.bottleneck}: {best.pressure.most:.0%} of what there is is wanted."


def _worth(plan: Plan, best: Trial) -> str:
    both, split = cheapest(plan.both), cheapest(plan.split)
    if both is None:
        return "Workers that do both do not hold it in any number tried: disaggregation is what makes it possible."
    if split is None:
        few = (
            "that was tried holds it: disaggregation is not worth it here" if plan.split else "was tried: it needs two"
        )
        return f"No split into prefill and decode workers {few}."
    if best is both:
        more = split.fleet.workers - both.fleet.workers
        if more:
            return f"Disaggregation is not worth it here: {split.fleet} would be needed, {more} more."
        return f"Disaggregation is not worth it here: {split.fleet} are as many, and leave less room."
    fewer = both.fleet.workers - split.fleet.workers
    if fewer:
        return f"Disaggregation saves {fewer} of {both.fleet.workers} workers: {both.fleet} would be needed."
    return f"Disaggregation saves no worker ({both.fleet} hold it too) and leaves more room."


def _just_short(plan: Plan) -> Iterator[Trial]:
    """Of each kind the largest fleet below enough, mostly a worker fewer; the nearest where none is enough."""
    for kind in (plan.both, plan.split):
        enough = cheapest(kind)
        fewer = [each for each in kind if not each.holds and enough and each.fleet.workers < enough.fleet.workers]
        if fewer:
            yield max(fewer, key=lambda each: (each.fleet.workers, not each.is_cut, -each.miss))
        elif kind and enough is None:
            yield min(kind, key=lambda each: each.distance)


def _why(trial: Trial) -> str:
    shares = trial.pressure
    if trial.load >= max(trial.ttft_miss, trial.itl_miss):
        what = f"{trial.load:.0%} of the seconds that it has are wanted, so it falls behind, if slowly"
    elif trial.ttft_miss >= trial.itl_miss:
        least = "at least " if trial.is_cut else ""
        ttft = f"{_number(trial.ttft_p99_s, '.2f')} s, {_times(trial.ttft_miss)} times the SLO"
        what = f"p99 TTFT is {least}{ttft}"
    else:
        least = "at least " if trial.is_cut else ""
        what = f"p99 ITL is {least}{trial.itl_p99_s * 1e3:.1f} ms, {_times(trial.itl_miss)} times the SLO"
        if trial.fleet.num_both and shares.prefill >= shares.decode:
            return f"{what}; prompts take {shares.prefill:.0%} of its time, and each stalls the streams beside it."
        if not trial.fleet.num_both and shares.prefill > 1:
            return f"{what}; prompts are {shares.prefill:.0%} of what its prefill workers compute, decode workers help."
    if shares.most < _SHORT:
        single = "one of a request's gaps is its handover, and short answers have few" if trial.fleet.num_decode else ""
        return f"{what}, though nothing is short ({shares.most:.0%} at most){f': {single}' if single else ''}."
    demand = f"prefill {shares.prefill:.0%}, decode {shares.decode:.0%}, KV memory {shares.kv_memory:.0%}"
    return f"{what}; it is short of {shares.bottleneck} ({demand}, handover link {shares.handover:.0%})."


def _unreachable(plan: Plan) -> Iterator[str]:
    most = max(plan.trials, key=lambda each: each.fleet.workers)
    least = min(plan.trials, key=lambda each: each.distance)
    yield (f"No fleet of up to {most.fleet.workers} workers holds the SLO. The nearest is {least.fleet}: {_why(least)}")
    if plan.alone_p99_s > plan.slo.ttft_s:
        yield (
            f"More workers cannot help: a prompt of p99's length takes {plan.alone_p99_s:.2f} s on an idle worker, and "
            f"the SLO is {plan.slo.ttft_s:g} s."
        )
    if plan.empty_step_s > plan.slo.tpot_s:
        yield (
            f"More workers cannot help: the shortest decode step takes {plan.empty_step_s * 1e3:.1f} ms, and the SLO "
            f"is {plan.slo.tpot_s * 1e3:g} ms."
        )
