"""How many of a model's workers should only prefill: what `--autorole` decides, once for each window of load.

A worker that decodes may compute prompts too, and what it is asked for first is decided request by request; a worker
that only prefills stalls nobody's tokens. So the one thing to choose is how many do nothing but prompts: a change makes
such a worker of one that decodes, or gives it back as one that does both (ADR 34). `role_need.py` tells what the load
needs and how great the pressure on a split is.

The first of these that is so is the decision:

| code         | what is so                                                               | what is done         |
|--------------|--------------------------------------------------------------------------|----------------------|
| `floor`      | fewer than the floor take prompts, or answers, and a worker can          | it does both         |
| `changing`   | a worker has not become what it was asked to be                          | wait                 |
| `cooling`    | the window began before the last change had ended                        | wait                 |
| `no_load`    | too few requests ended                                                   | nothing              |
| `slo_kept`   | 99 % are within their SLO, and the pressure is at most 1                 | nothing              |
| `enough`     | the pressure is at most 0.8; at most 0.5 while the SLO is missed         | nothing              |
| `best`       | no other number has a twentieth less pressure                            | nothing              |
| `nobody`     | no worker can change that way: pinned, unable, or the floor              | nothing              |
| `too_dear`   | in the horizon the step spares less than twice the seconds that it costs | nothing              |
| `turns_back` | within the horizon, much the same load had it changed the other way      | nothing              |
| `once_more`  | the last window that was weighed did not want it                         | wait                 |
| `change`     |                                                                          | one worker, one step |
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from planes.wire.messages import Registration, Role, RoleWish, WorkerId, WorkerState
from router.load import ModelLoad
from router.role_need import Need, need, typical
from router.stats import WorkerStatus

_FEW: Final = 10
"""Requests: fewer in a window say nothing."""
_SLO_KEPT: Final = 0.99
_CALM: Final = 0.8
"""Of what there is: busier, and the first tokens' waits grow faster than the load."""
_MISSED: Final = 0.5
"""What counts as busy while the SLO is missed: then the formula is too hopeful."""
_MOST_PRESSURE: Final = 100.0
"""More, endless included, is no worse."""
_BETTER: Final = 0.95
_MARGIN: Final = 2.0
"""So many times what a change costs has to come back within the horizon."""
_NEWS_S: Final = 2.0
"""Of a worker's time that each change costs: until everybody knows of it."""
_ALMOST: Final = 0.99
"""Of a window: timers are early or late."""


class Verdict(StrEnum):
    """See the table."""

    FLOOR = "floor"
    CHANGING = "changing"
    COOLING = "cooling"
    NO_LOAD = "no_load"
    SLO_KEPT = "slo_kept"
    ENOUGH = "enough"
    BEST = "best"
    NOBODY = "nobody"
    TOO_DEAR = "too_dear"
    TURNS_BACK = "turns_back"
    ONCE_MORE = "once_more"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class RoleGoals:
    """What the decision keeps to.

    window_s: how much load is looked at for each.  horizon_s: within which a change must pay.
    min_prefill, min_decode: of a model's workers, so many take prompts, and answers.
    """

    window_s: float = 60.0
    horizon_s: float = 600.0
    min_prefill: int = 1
    min_decode: int = 1


class RoleChange(msgspec.Struct, frozen=True):
    """One worker's, to be wished for."""

    worker: WorkerId
    epoch: int
    before: Role
    role: Role


class RoleDecision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided for one model, and the numbers behind it; numbers are 0 where it was not needed to know them."""

    model: str
    code: Verdict
    reason: str
    change: RoleChange | None = None
    num_prefill: int = 0
    """Workers that only prefill …"""
    num_decode: int = 0
    """… and all that take answers."""
    best_num_prefill: int = 0
    """Of the former, with the least pressure."""
    prefill_need: float = 0.0
    decode_need: float = 0.0
    """In workers."""
    pressure: float = 0.0
    best_pressure: float = 0.0
    attainment: float | None = None
    requests_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Member:
    """One worker that counts."""

    registration: Registration
    status: WorkerStatus

    @property
    def takes_answers(self) -> bool:
        return self.registration.takes_answers

    def can_become(self, role: Role) -> bool:
        return role in self.registration.roles and not self.registration.is_pinned


@dataclass(frozen=True, slots=True)
class _Step:
    """One worker's change. pressure: afterwards.  spared_s, cost_s: of workers' time, within the horizon."""

    is_more: bool
    pressure: float
    spared_s: float
    cost_s: float


@dataclass(slots=True)
class _Past:
    """What is remembered of a model. settled_at: since when nothing changes."""

    settled_at: float = -math.inf
    asked: RoleChange | None = None
    asked_at: float = -math.inf
    is_more_prefill: bool | None = None
    """Which way the last change went …"""
    changed_at: float = -math.inf
    need: Need | None = None
    """… and for what."""
    wanted: bool | None = None
    """Which way the last window that was weighed wanted to go."""


class RolePlanner:
    """Decides, once a window, one change at a time. A gateway and the simulator drive it alike."""

    def __init__(self, goals: RoleGoals) -> None:
        self.goals = goals
        self._pasts: dict[str, _Past] = {}

    def decide(
        self,
        workers: Iterable[Registration],
        statuses: Iterable[WorkerStatus],
        loads: Mapping[str, ModelLoad],
        *,
        now: float,
    ) -> list[RoleDecision]:
        """One decision for each model that has workers which can change.

        workers: as they are registered; those without a status, or that stop, count for nothing.
        loads: of the window that ends now.
        """
        known = {status.worker: status for status in statuses}
        models: dict[str, list[_Member]] = {}
        for worker in sorted(workers, key=lambda each: each.worker):
            status = known.get(worker.worker)
            if status is not None and worker.state is WorkerState.READY and not worker.facts.embedding_size:
                models.setdefault(worker.model, []).append(_Member(worker, status))
        self._pasts = {model: self._pasts.get(model, _Past()) for model in models}
        return [
            self._decide(model, members, loads.get(model, ModelLoad()), now)
            for model, members in models.items()
            if any(member.registration.roles for member in members)
        ]

    def asked(self, model: str, change: RoleChange, *, now: float) -> None:
        """The worker has been asked for the change that was decided last."""
        past = self._pasts[model]
        past.asked, past.asked_at = change, now

    def wish(self, change: RoleChange) -> RoleWish:
        """What the worker is asked: what has not ended after a window goes on elsewhere."""
        return RoleWish(change.epoch, change.role, self.goals.window_s, is_pin=False)

    def _decide(self, model: str, members: Sequence[_Member], load: ModelLoad, now: float) -> RoleDecision:
        past = self._pasts[model]
        num_prefill = sum(not member.takes_answers for member in members)
        told = RoleDecision(
            model=model,
            code=Verdict.BEST,
            reason="",
            num_prefill=num_prefill,
            num_decode=len(members) - num_prefill,
            best_num_prefill=num_prefill,
            attainment=load.attainment,
            requests_per_s=load.arrived / self.goals.window_s,
        )
        if waiting := self._changing(past, members, now):
            past.settled_at = now
            return _told(told, Verdict.CHANGING, waiting)
        if (repair := self._repair(members)) is not None:
            return _told(told, Verdict.FLOOR, f"{repair.worker} shall do both: too few do", repair)
        if now - past.settled_at < _ALMOST * self.goals.window_s:
            return _told(told, Verdict.COOLING, "a whole window with the fleet as it is has to pass")
        wanted, past.wanted = past.wanted, None
        if load.ended < _FEW:
            return _told(told, Verdict.NO_LOAD, f"{load.ended:.0f} requests ended; fewer than {_FEW} say nothing")
        facts = [msgspec.structs.replace(each.registration.facts, latency=each.status.latency) for each in members]
        needed = need(load, typical(facts), self.goals.window_s)
        return self._weighed(told, needed, members, load, wanted, now)

    def _weighed(
        self,
        told: RoleDecision,
        needed: Need,
        members: Sequence[_Member],
        load: ModelLoad,
        wanted: bool | None,
        now: float,
    ) -> RoleDecision:
        """Whether another number of prefill workers would be better. wanted: which way the window before would go."""
        total, num_prefill = len(members), told.num_prefill
        most = min(max(total - self.goals.min_decode, num_prefill), total - 1)
        pressures = [needed.pressure(number, total - number) for number in range(most + 1)]
        # Of equal ones the nearest: the formula need not be believed to the last digit.
        best = min(range(most + 1), key=lambda number: (round(pressures[number], 6), abs(number - num_prefill)))
        pressure = needed.pressure(num_prefill, told.num_decode)
        told = msgspec.structs.replace(
            told,
            best_num_prefill=best,
            prefill_need=needed.prefill,
            decode_need=needed.decode,
            pressure=_finite(pressure),
            best_pressure=_finite(pressures[best]),
        )
        is_kept = load.attainment is not None and load.attainment >= _SLO_KEPT
        calm = _CALM if is_kept or load.attainment is None else _MISSED
        if is_kept and pressure <= 1:
            return _told(told, Verdict.SLO_KEPT, f"{load.attainment:.1%} are within their SLO")
        if pressure <= calm:
            return _told(told, Verdict.ENOUGH, f"the pressure is {pressure:.2f}; up to {calm:g} is enough")
        if pressures[best] > _BETTER * pressure:
            reason = f"the pressure is {pressure:.2f}, with the best number of prefill workers {pressures[best]:.2f}"
            return _told(told, Verdict.BEST, reason)
        return self._stepped(told, needed, members, self._step(told, needed, load, calm), wanted, now)

    def _step(self, told: RoleDecision, needed: Need, load: ModelLoad, calm: float) -> _Step:
        """One worker towards the best number, and whether that pays."""
        is_more = told.best_num_prefill > told.num_prefill
        change = 1 if is_more else -1
        pressure = needed.pressure(told.num_prefill + change, told.num_decode - change)
        total = told.num_prefill + told.num_decode
        spared_s = (_excess(told.pressure, calm) - _excess(pressure, calm)) * total * self.goals.horizon_s
        drain_s = load.stream_s / load.streams if is_more and load.streams else 0.0
        return _Step(is_more, pressure, spared_s, _NEWS_S + min(self.goals.window_s, drain_s))

    def _stepped(
        self,
        told: RoleDecision,
        needed: Need,
        members: Sequence[_Member],
        step: _Step,
        wanted: bool | None,
        now: float,
    ) -> RoleDecision:
        past, horizon_s = self._pasts[told.model], self.goals.horizon_s
        change = self._to_prefill(members) if step.is_more else _to_both(members)
        if change is None:
            way = "only prefill" if step.is_more else "decode too"
            return _told(told, Verdict.NOBODY, f"no worker can be told to {way}: unable, pinned, or the floor")
        paying = (
            f"{change.worker} to {change.role}: pressure {told.pressure:.2f} to {step.pressure:.2f}, which spares "
            f"{step.spared_s:.0f} worker-seconds in {horizon_s:g} s and costs {step.cost_s:.0f}"
        )
        if step.spared_s < _MARGIN * step.cost_s:
            return _told(told, Verdict.TOO_DEAR, paying)
        is_back = past.is_more_prefill is (not step.is_more) and now - past.changed_at <= horizon_s
        if is_back and past.need is not None and needed.is_like(past.need):
            return _told(told, Verdict.TURNS_BACK, "the change before went the other way, for much the same load")
        past.wanted = step.is_more
        if wanted is not step.is_more:
            return _told(told, Verdict.ONCE_MORE, f"{paying}; if the next window agrees")
        past.is_more_prefill, past.changed_at, past.need = step.is_more, now, needed
        return _told(told, Verdict.CHANGE, paying, change)

    def _changing(self, past: _Past, members: Sequence[_Member], now: float) -> str:
        """Which worker's change is awaited; empty: none."""
        for member in members:
            if member.registration.becoming is not None:
                return f"{member.registration.worker} becomes {member.registration.becoming}"
        asked = past.asked
        if asked is not None:
            at = next((each.registration for each in members if each.registration.worker == asked.worker), None)
            is_open = at is not None and at.epoch == asked.epoch and at.role is not asked.role and not at.is_pinned
            if is_open and now - past.asked_at < self.goals.window_s:
                return f"{asked.worker} has not answered the wish to become {asked.role}"
            past.asked = None
            past.settled_at = now
        return ""

    def _repair(self, members: Sequence[_Member]) -> RoleChange | None:
        """What gives the floor back, if it is not there."""
        if sum(member.takes_answers for member in members) < self.goals.min_decode:
            return _to_both(members)
        if sum(member.registration.takes_prompts for member in members) < self.goals.min_prefill:
            return _to_both(members, Role.DECODE)
        return None

    def _to_prefill(self, members: Sequence[_Member]) -> RoleChange | None:
        """The worker with the fewest answers to end."""
        taking = [member for member in members if member.takes_answers]
        if len(taking) - 1 < max(1, self.goals.min_decode):
            return None
        able = [each for each in taking if each.can_become(Role.PREFILL) and each.registration.handover is not None]
        return _change(able, Role.PREFILL, lambda member: member.status.num_running)


def _to_both(members: Sequence[_Member], role: Role = Role.PREFILL) -> RoleChange | None:
    """Of those of this role that can do both the one with the fewest prompts."""
    able = [each for each in members if each.registration.role is role and each.can_become(Role.BOTH)]
    return _change(able, Role.BOTH, lambda member: member.status.waiting_prefill_tokens)


def _change(able: Sequence[_Member], role: Role, work: Callable[[_Member], float]) -> RoleChange | None:
    if not able:
        return None
    own = min(able, key=lambda member: (work(member), member.registration.worker)).registration
    return RoleChange(own.worker, own.epoch, own.role, role)


def _told(told: RoleDecision, code: Verdict, reason: str, change: RoleChange | None = None) -> RoleDecision:
    return msgspec.structs.replace(told, code=code, reason=reason, change=change)


def _excess(pressure: float, calm: float) -> float:
    return max(0.0, min(pressure, _MOST_PRESSURE) - calm)


def _finite(pressure: float) -> float:
    """As JSON can say it."""
    return min(pressure, 1e6)
