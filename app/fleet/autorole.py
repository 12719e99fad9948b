"""`--autorole`: one of the gateways that have it changes workers' roles as the load changes (ADR 34).

    every window   each gateway tells what it was asked for ── etcd ──► the elected one adds it up, decides, wishes

Which worker shall do what is `router/roles.py`'s to decide; who may act is `planes/election.py`'s. While
etcd is away nothing is decided.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

import msgspec
import structlog

from app.metrics import Gauge, Total
from app.serving.binding import Clock
from planes.control import ControlPlaneUnavailable
from planes.election import Candidate, OfficeLost
from planes.role_wishes import put_holders_wish
from planes.wire.messages import Registration
from planes.wire.unreadable import UNREADABLE
from router.load import ModelLoad, since, together
from router.roles import RoleDecision, RolePlanner, Verdict
from router.stats import WorkerStatus

_log = structlog.get_logger()

OFFICE: Final = "autorole"
_KEPT_S: Final = 3600
"""How long etcd keeps the last decision."""

_Loads = dict[str, ModelLoad]


class DecidedRoles(msgspec.Struct, frozen=True):
    """The last decisions, as `headrace fleet` and `GET /v1/fleet` tell them."""

    gateway: str
    decided_at: float
    """Seconds since 1970."""
    decisions: list[RoleDecision]


class LoadedRouter(Protocol):
    """What is needed of `router.router.Router`."""

    def loads(self) -> Mapping[str, ModelLoad]: ...
    def workers(self, *, now: float) -> list[WorkerStatus]: ...


class Autorole:
    """See above. One for each gateway that has the flag.

    registrations: of all workers, as they are now.  clock: a monotonic one.  wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        planner: RolePlanner,
        candidate: Candidate,
        router: LoadedRouter,
        registrations: Callable[[], Iterable[Registration]],
        *,
        namespace: str,
        gateway: str,
        clock: Clock,
        wall_clock: Clock,
    ) -> None:
        self._planner, self._candidate, self._router = planner, candidate, router
        self._registrations = registrations
        self._namespace, self._gateway = namespace, gateway
        self._clock, self._wall_clock = clock, wall_clock
        self._before = router.loads()
        self._was_elected = False
        self._last: DecidedRoles | None = None
        self._num_changes = self._num_failed = 0

    async def run(self) -> None:
        """Run for the office and decide while it is held, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._candidate.run())
            tasks.create_task(self._decide_again())

    @property
    def told(self) -> dict[str, Any]:
        """As JSON: whether this gateway decides, and what it decided last."""
        return {"is_elected": self._candidate.is_holder, "last": msgspec.to_builtins(self._last)}

    def gauges(self) -> Iterator[Gauge]:
        """For the metrics."""
        yield Gauge("autorole_elected", "1 if this gateway changes roles.", self._candidate.is_holder)
        yield Total("autorole_changes", "Roles that this gateway asked for.", self._num_changes)
        yield Total("autorole_failed", "Windows without a decision, or with one that etcd refused.", self._num_failed)
        if self._last is None or not self._candidate.is_holder:
            return
        for each in self._last.decisions:
            label = (("model", each.model),)
            yield Gauge("autorole_pressure", "Demand over supply; 1: all there is.", each.pressure, label)
            for role, need in (("prefill", each.prefill_need), ("decode", each.decode_need)):
                named = (*label, ("role", role))
                yield Gauge("autorole_need_workers", "Workers that the load keeps busy.", need, named)
            best = each.best_num_prefill
            yield Gauge("autorole_best_prefill_workers", "Of workers that only prefill.", best, label)

    async def _decide_again(self) -> None:
        while True:
            await asyncio.sleep(self._planner.goals.window_s)
            try:
                await self.window_ended()
            except (ControlPlaneUnavailable, OfficeLost) as exc:
                self._num_failed += 1
                _log.warning("autorole.failed", code=exc.code, reason=str(exc))
            except Exception:  # noqa: BLE001 - what other gateways tell may be anything: no reason to end
                self._num_failed += 1
                _log.exception("autorole.defect")

    async def window_ended(self) -> None:
        """Tell what it brought, and decide if elected.  Raises:  ControlPlaneUnavailable, OfficeLost."""
        now = self._router.loads()
        own, self._before = since(now, self._before), now
        was_elected, self._was_elected = self._was_elected, self._candidate.is_holder
        await self._candidate.tell(msgspec.json.encode(own))
        if self._was_elected:
            if not was_elected:
                self._planner = RolePlanner(self._planner.goals)  # what it remembers is of another time
            await self._decide()

    async def _decide(self) -> None:
        loads = together([_loads(told) for told in (await self._candidate.heard()).values()])
        now = self._clock()
        decisions = self._planner.decide(self._registrations(), self._router.workers(now=now), loads, now=now)
        self._last = DecidedRoles(self._gateway, self._wall_clock(), decisions)
        await self._candidate.note(msgspec.json.encode(self._last), ttl_s=_KEPT_S)
        for decision in decisions:
            tell = _log.info if decision.change is not None else _log.debug
            if decision.code not in {Verdict.COOLING, Verdict.NO_LOAD}:
                tell("autorole.decided", **_told(decision))
            if decision.change is not None:
                wish = self._planner.wish(decision.change)
                await put_holders_wish(self._candidate, self._namespace, decision.change.worker, wish)
                self._planner.asked(decision.model, decision.change, now=now)
                self._num_changes += 1


def _loads(told: bytes) -> _Loads:
    """What a gateway told; another version's, that cannot be read, counts for nothing."""
    try:
        return msgspec.json.decode(told, type=_Loads)
    except UNREADABLE as exc:
        _log.warning("autorole.unreadable", reason=str(exc))
        return {}


def _told(decision: RoleDecision) -> dict[str, object]:
    """For the log."""
    change = decision.change
    told: dict[str, object] = {
        "model": decision.model,
        "code": decision.code.value,
        "reason": decision.reason,
        "num_prefill": decision.num_prefill,
        "num_decode": decision.num_decode,
        "best_num_prefill": decision.best_num_prefill,
        "prefill_need": round(decision.prefill_need, 2),
        "decode_need": round(decision.decode_need, 2),
        "pressure": round(decision.pressure, 3),
        "attainment": None if decision.attainment is None else round(decision.attainment, 4),
        "requests_per_s": round(decision.requests_per_s, 2),
    }
    return told if change is None else {**told, "worker": change.worker, "before": change.before, "role": change.role}
