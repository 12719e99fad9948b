"""The router: one object that decides and reserves in the same step. No I/O; every method takes `now` in seconds.

This file is the contract that the gateway and the simulator are written against; see `docs/adr/` for why it queues.

    submit ── refused: QueueFull, SloMissed, NoWorker, NoPair, DuplicateRequest (raised)
       └────► waiting ── dispatch ──► bound ── prefilled ── release
                 │  └── refused: DeadlineExceeded, SloMissed, NoWorker, NoPair, PolicyFailed (returned)
                 └── withdraw

How a request is bound is in `router/late_binding.py`.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from planes.wire.errors import Expired, Rejected
from planes.wire.messages import (
    KvEvents,
    LoadReport,
    Registration,
    RequestBound,
    RequestId,
    RequestNews,
    RequestPrefilled,
    RequestReleased,
    Snapshot,
    WorkerId,
)
from router.decision import Decision, decide, is_our_own
from router.decision_log import History
from router.errors import DeadlineExceeded, DuplicateRequest, QueueFull, SloMissed
from router.fairness import ServiceMeter
from router.fleet import Fleet
from router.late_binding import LateBinding, Walk
from router.load import LoadMeter, ModelLoad
from router.peers import PeerRequests, told_of
from router.policies.headrace import Headrace
from router.policy import FleetView, Policy
from router.queue import Queue, Waiting
from router.request import Candidate, Explanation, Observed, Outcome, RoutableRequest, Route, SloSource
from router.settings import RouterSettings
from router.stats import Counts, LinkStatus, RouterStats, ShadowStats, WorkerStatus
from router.timeline import Timeline
from router.worker import Reservation

_BY_GATEWAY: Final = SloSource.GATEWAY  # bound once, see CONTRIBUTING.md
_BY_MODEL: Final = SloSource.MODEL
_BY_NOBODY: Final = SloSource.NOBODY
_FINISHED: Final = Outcome.FINISHED
_LENGTH_GAIN = 0.02
_LEAST_SHARE = 0.01
_RATE_WINDOW_S = 10.0
_FOUND_GAIN = 0.05  # of each request that comes, in the share that found others there
_FRESH_S = 0.002  # for so long a decision holds while nothing changes
_MAX_MODELS = 1024  # whose answers' lengths are remembered; the one that has been silent for longest is forgotten


@dataclass(frozen=True, slots=True)
class Refusal:
    """A queued request that will not be served; `error` says why."""

    request: RequestId
    error: Rejected | Expired


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was decided to see whether a request can be in time: it is bound so unless anything has changed since."""

    request: RoutableRequest
    decision: Decision
    view: FleetView
    changes: int
    until: float


class Router:
    """Fleet, block index, queue and policy of one gateway."""

    def __init__(
        self,
        settings: RouterSettings | None = None,
        policy: Policy | None = None,
        *,
        shadow: Policy | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`shadow` decides too and is not obeyed; `rng` breaks ties between equally good workers."""
        self._settings = settings or RouterSettings()
        self._policy: Policy = policy or Headrace()
        self._policy_name = self._policy.name
        self._shadow, self._shadow_name = shadow, "" if shadow is None else shadow.name
        self._rng = rng or random.Random(0)
        self._estimate = Headrace()
        self._fleet = Fleet()
        self._queue = Queue(self._settings)
        self._late_binding = LateBinding(self._fleet, self._queue)
        self._fleet_version = -1
        self._bound: dict[RequestId, tuple[Reservation, Candidate, RoutableRequest, float]] = {}
        """With what was asked for, and when."""
        self._history = History(self._settings.history)
        self._counts = Counts()
        self._length_shares: dict[str, float] = {}
        self._bind_rate = BindRate()
        self._service = ServiceMeter()
        self._asked: _Asked | None = None
        self._meter = LoadMeter()
        self._found_busy = 0.0
        self._peers = PeerRequests(self._fleet, own=self._bound)
        self._on_news: Callable[[RequestNews], None] | None = None

    def configure(self, settings: RouterSettings, policy: Policy, *, shadow: Policy | None = None) -> None:
        """Change settings and policies. Waiting requests stay, and are decided anew at the next `dispatch`."""
        shadow_name = "" if shadow is None else shadow.name
        if shadow_name != self._shadow_name:
            self._counts.forget_shadow()
        self._settings = settings
        self._policy, self._policy_name = policy, policy.name
        self._shadow, self._shadow_name = shadow, shadow_name
        self._queue.configure(settings)
        self._history.trim(settings.history)
        self._late_binding.forget()
        self._asked = None

    # --- the fleet: control and event plane ---------------------------------------------------------------------

    def worker_up(self, registration: Registration) -> None:
        """A worker registered or changed its registration. A new epoch forgets everything about the old one."""
        self._fleet.up(registration)

    def worker_down(self, worker: WorkerId) -> None:
        """A worker's registration is gone, or its stream was found dead. Its reservations stay until released."""
        self._fleet.down(worker)

    def apply_events(self, batch: KvEvents) -> None:
        """Apply one publication; duplicates, gaps and foreign epochs are noticed here and healed by a snapshot."""
        self._fleet.apply_events(batch)

    def apply_snapshot(self, snapshot: Snapshot) -> None:
        """Replace what is known of a worker's blocks."""
        self._fleet.index.apply_snapshot(snapshot)

    def apply_load(self, report: LoadReport, *, now: float) -> None:
        """Take over a load report; a digest that differs from our copy's marks the worker for a snapshot."""
        self._fleet.apply_load(report, now=now, report_delay_s=self._settings.report_delay_s)
        self._late_binding.room_changed()

    def workers_to_snapshot(self) -> list[WorkerId]:
        """Workers whose blocks we do not know for sure. Stays so until `apply_snapshot`; the caller paces itself."""
        return self._fleet.index.inexact()

    # --- other gateways ----------------------------------------------------------------------------------------

    def watch_news(self, on_news: Callable[[RequestNews], None] | None) -> None:
        """Tell of each request that is bound, computed or released from now on; None: no longer."""
        self._on_news = on_news

    def all_bound(self, *, now: float) -> list[RequestBound]:
        """All that is bound, as `on_news` told of it."""
        return [told_of(bound[0], now) for bound in self._bound.values()]

    def apply_news(self, gateway: str, news: Iterable[RequestNews], *, now: float) -> bool:
        """What another gateway has bound, and so on: it is counted as if it was ours.

        Returns:  whether any of its requests has ended, so that there may be room.
        """
        has_ended = self._peers.apply(gateway, news, now)
        if has_ended:
            self._late_binding.room_changed()
        return has_ended

    def incomplete_gateways(self) -> list[str]:
        """Those that told of requests on workers which have come up here only since."""
        return self._peers.incomplete()

    def forget_gateway(self, gateway: str, *, now: float) -> None:
        """What that gateway told counts no longer."""
        self._peers.forget(gateway, now)
        self._late_binding.room_changed()

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: RoutableRequest, *, now: float) -> None:
        """Queue a request; call `dispatch` next.

        Raises:  QueueFull, SloMissed, NoWorker, NoPair, DuplicateRequest (all Rejected): the request is not queued.
        """
        if request.request in self._queue or request.request in self._bound:
            raise DuplicateRequest(request.request)
        request = self._completed(request)
        explanation = self._explanation(request, now)
        found_others = bool(self._bound or len(self._queue) or len(self._peers))
        self._found_busy += _FOUND_GAIN * (found_others - self._found_busy)
        try:
            self._check(request, now)
        except Rejected as exc:
            self._refused(explanation, exc)
            self._history.add(explanation)
            if isinstance(exc, QueueFull | SloMissed):
                self._meter.arrived(request)
                self._meter.refused(request)
            raise
        self._meter.arrived(request)
        uncached, seconds = self._late_binding.shortest(request)
        self._queue.add(request, uncached, seconds, explanation, now=now)
        self._service.asks(
            request.request, request.tenant, uncached, model=request.model, priority=request.priority, now=now
        )
        self._history.add(explanation)

    def _completed(self, request: RoutableRequest) -> RoutableRequest:
        """With the length that is learnt, and the SLOs that it leaves to us."""
        share, settings = self._length_shares.get(request.model, 1.0), self._settings
        changes: dict[str, Any] = {}
        if share < 1.0 and request.expected_tokens > 1:  # only who asks for one token ends with its prefill
            changes["expected_tokens"] = max(2, round(request.expected_tokens * share))
        model = settings.slos_of(request.model)
        for source, slos in ((_BY_GATEWAY, settings), (_BY_MODEL, model)):
            if request.slo_ttft_s is None and slos.slo_ttft_s is not None:
                changes |= {"slo_ttft_s": slos.slo_ttft_s, "slo_ttft_from": source}
            if request.slo_itl_s is None and slos.slo_itl_s is not None:
                changes |= {"slo_itl_s": slos.slo_itl_s, "slo_itl_from": source}
        return msgspec.structs.replace(request, **changes) if changes else request

    def _check(self, request: RoutableRequest, now: float) -> None:
        limit = self._settings.queue_limit
        if len(self._queue) >= limit:
            raise QueueFull(len(self._queue), limit, retry_after_s=self._bind_rate.seconds_for(limit / 10, now))
        if not self._fleet.can_serve(request):
            raise self._fleet.refusal(request)
        slo_s = self._slo(request)
        view = (
            None
            if slo_s is None
            else self._fleet.view(request, {}, now, self._rng, len(self._queue) + 1, found_busy=self._found_busy)
        )
        if slo_s is not None and view is not None:
            # Our own rule, whatever the policy: that one may remember what it is asked, and is asked when it counts.
            decision = decide(self._estimate, self._estimate.name, request, view)
            self._check_slo(decision.chosen, self._wait_s(request, decision.chosen, now), slo_s)
            if is_our_own(self._policy) and not len(self._queue):
                self._asked = _Asked(request, decision, view, self._fleet.changes, now + _FRESH_S)

    def dispatch(self, *, now: float) -> list[Route | Refusal]:
        """Bind every request whose time has come, and reserve for it. Call after anything changed, and at `wakeup`.

        A policy cannot make it raise; where it answers badly the request that it was asked about is refused.
        """
        answers: list[Route | Refusal] = [
            self._turn_away(waiting, DeadlineExceeded(now - waiting.submitted_at), now)
            for waiting in self._queue.expired(now)
        ]
        if len(self._queue):
            answers += self._refuse_unservable(now)
            self._queue.promote(now)
            self._queue.let_go(now)
            walk = self._late_binding.walk(now)
            for waiting in walk:
                answer = self._answer(waiting, walk, now)
                if answer is not None:
                    answers.append(answer)
        return answers

    def _refuse_unservable(self, now: float) -> list[Refusal]:
        """Those that waited for workers which are gone: looked for only when the fleet has changed."""
        if self._fleet_version == self._fleet.version:
            return []
        self._fleet_version = self._fleet.version
        lost = [waiting for waiting in self._queue.all() if not self._fleet.can_serve(waiting.request)]
        return [self._turn_away(waiting, self._fleet.refusal(waiting.request), now) for waiting in lost]

    def _answer(self, waiting: Waiting, walk: Walk, now: float) -> Route | Refusal | None:
        """Ask the policy about one request, and bind or refuse it. None: it is held back."""
        request, explanation = waiting.request, waiting.explanation
        asked, self._asked = self._asked, None
        if asked is not None and self._still_holds(asked, request, now):
            decision, view = asked.decision, asked.view
        else:
            looked = self._fleet.view(
                request,
                walk.ahead,
                now,
                self._rng,
                len(self._queue),
                waited_s=now - waiting.submitted_at,
                hopeful=self._queue.hopeful(),
                makes_way=self._slo(request) is None and waiting.makes_way(now),
                lets_pass=self._slo(request) is None and waiting.lets_pass(now),
                without_room=walk.without_room,
                waiting_shares=self._late_binding.shares,
                found_busy=self._found_busy,
            )
            if looked is None:
                return self._turn_away(waiting, self._fleet.refusal(request), now)
            view = looked
            try:
                decision = decide(self._policy, self._policy_name, request, view)
            except Rejected as exc:
                return self._turn_away(waiting, exc, now)
        held_s = now - waiting.submitted_at
        explanation.policy = self._policy_name
        explanation.candidates, explanation.chosen = decision.kept, decision.chosen
        explanation.held_s = held_s
        if decision.is_held:
            self._counts.held += waiting.bids is None
            explanation.held_because = decision.held_because
            walk.held(waiting, decision)
            return None
        slo_s = self._slo(request)
        if decision.makes_way_because and slo_s is None and not waiting.is_late and not request.is_retry:
            explanation.held_because = decision.makes_way_because
            self._queue.make_way(waiting)
            self._late_binding.wakeup = now
            return None
        try:
            if slo_s is not None:
                self._check_slo(decision.chosen, held_s, slo_s)
        except SloMissed as exc:
            return self._turn_away(waiting, exc, now)
        route = self._bind(waiting, decision, view, now)
        walk.bound(decision.chosen)
        return route

    def _still_holds(self, asked: _Asked, request: RoutableRequest, now: float) -> bool:
        is_alone = asked.request is request and len(self._queue) == 1
        return is_alone and asked.changes == self._fleet.changes and now <= asked.until

    def _bind(self, waiting: Waiting, decision: Decision, view: FleetView, now: float) -> Route:
        request, chosen = waiting.request, decision.chosen
        self._queue.serve(waiting)
        due_at = math.inf if request.slo_ttft_s is None else waiting.submitted_at + request.slo_ttft_s
        self._peers.drop(request.request, now)
        reservation = self._fleet.reserve(request, chosen, now, due_at)
        self._bound[request.request] = reservation, chosen, request, waiting.submitted_at
        if self._on_news is not None:
            self._on_news(told_of(reservation, now))
        self._bind_rate.add(now)
        self._counts.decisions[self._policy_name] += 1
        self._counts.local += chosen.prefill is None
        if self._shadow is not None:
            self._ask_shadow(self._shadow, waiting, chosen, view)
        return Route(
            request=request.request,
            prefill=chosen.prefill,
            decode=chosen.decode,
            cached_tokens=chosen.cached_tokens,
            decode_cached_tokens=chosen.decode_cached_tokens,
            predicted=chosen,
            policy=self._policy_name,
            held_s=now - waiting.submitted_at,
            num_candidates=len(decision.kept),
        )

    def _ask_shadow(self, shadow: Policy, waiting: Waiting, chosen: Candidate, view: FleetView) -> None:
        request = waiting.request
        try:
            other = decide(shadow, self._shadow_name, request, view).chosen
        except Rejected:
            self._counts.shadow_failed += 1
            return
        waiting.explanation.shadow = other
        self._counts.compare(chosen, other)

    def _turn_away(self, waiting: Waiting, error: Rejected | Expired, now: float) -> Refusal:
        self._queue.remove(waiting)
        self._service.gave_up(waiting.request.request, now=now)
        self._refused(waiting.explanation, error)
        self._meter.refused(waiting.request)
        return Refusal(waiting.request.request, error)

    def _refused(self, explanation: Explanation, error: Rejected | Expired) -> None:
        explanation.refused_because = str(error)
        self._counts.refusals[error.code] += 1

    def _slo(self, request: RoutableRequest) -> float | None:
        """Later than this it is refused."""
        return request.slo_ttft_s if self._settings.refuse_late and not request.is_retry else None

    def _wait_s(self, request: RoutableRequest, chosen: Candidate, now: float) -> float:
        """Predicted wait in the queue; who passes those that are computed need not wait for room."""
        return 0.0 if chosen.num_passed else self._late_binding.wait_s(request, now)

    def _check_slo(self, chosen: Candidate, waiting_s: float, slo_s: float) -> None:
        ttft_s = waiting_s + chosen.ttft_s
        if ttft_s > slo_s:
            # What lies before it shrinks by a second a second; its own prefill does not.
            waits_s = waiting_s + chosen.queue_s
            missing_s = ttft_s - slo_s
            raise SloMissed(ttft_s, slo_s, retry_after_s=missing_s if missing_s <= waits_s else None)

    def wakeup(self) -> float | None:
        """The instant at which `dispatch` should run though nothing else happened; None: no need."""
        if not len(self._queue):
            return None
        return min(self._queue.wakeup(), self._late_binding.wakeup)

    def withdraw(self, request: RequestId, *, now: float) -> None:
        """The client of a queued request went away. Unknown ids are ignored (it may just have been bound)."""
        waiting = self._queue.get(request)
        if waiting is not None:
            self._queue.remove(waiting)
            self._service.gave_up(request, now=now)
            waiting.explanation.held_s = now - waiting.submitted_at
            waiting.explanation.refused_because = "withdrawn by its client"

    def is_bound(self, request: RequestId) -> bool:
        """Whether a reservation is held for it."""
        return request in self._bound

    def prefilled(self, request: RequestId, *, now: float) -> None:
        """The prompt has been computed (prefill leg answered, or a local first token came): frees prefill load."""
        bound = self._bound.get(request)
        if bound is not None:
            if self._on_news is not None and not bound[0].is_prefilled:
                self._on_news(RequestPrefilled(request))
            self._fleet.prefilled(bound[0], now)
            self._service.served(request, now=now)

    def release(self, request: RequestId, observed: Observed, *, now: float) -> None:
        """Give back the reservation of a bound request, exactly once, and learn from it. Raises KeyError if unbound."""
        reservation, predicted, asked, submitted_at = self._bound.pop(request)
        self._fleet.release(reservation, observed.completion_tokens, now)
        if self._on_news is not None:
            self._on_news(RequestReleased(request, max(0, observed.completion_tokens)))
        if observed.outcome is _FINISHED:
            self._service.served(request, now=now)
        else:
            self._service.gave_up(request, now=now)
        self._late_binding.room_changed()
        self._fleet.learn(reservation, observed)
        self._counts.observe(predicted, observed)
        if observed.outcome is _FINISHED and observed.completion_tokens > 0:
            model = reservation.decoding.registration.model
            self._learn_length(model, observed.completion_tokens / max(1, reservation.expected_tokens))
        self._meter.released(asked, observed, submitted_at=submitted_at, bound_at=reservation.bound_at, now=now)
        explanation = self._history.get(request)
        if explanation is not None:
            explanation.observed = observed

    def _learn_length(self, model: str, ratio: float) -> None:
        """Callers plan with `max_tokens` where they know no better; answers are mostly shorter, by much the same."""
        share = self._length_shares.pop(model, 1.0)
        share += _LENGTH_GAIN * (min(ratio, 2.0) * share - share)
        self._length_shares[model] = min(max(share, _LEAST_SHARE), 1.0)
        if len(self._length_shares) > _MAX_MODELS:
            del self._length_shares[next(iter(self._length_shares))]

    # --- answers about itself --------------------------------------------------------------------------------------

    def explain(self, request: RequestId) -> Explanation | None:
        """What was decided for a recent request, and what came of it."""
        return self._history.get(request)

    def ended(self, request: RequestId, timeline: Callable[[], Timeline]) -> None:
        """A request is over, however it ended. timeline: called once, when somebody asks about it, if anybody does."""
        self._history.close(request, timeline)

    def recent(self, tenant: str | None, limit: int) -> list[Explanation]:
        """The last requests that have ended, the latest first.  tenant: whose; None: everybody's."""
        return self._history.ended(tenant, limit)

    def loads(self) -> dict[str, ModelLoad]:
        """What has been asked for and served, per model, since the start."""
        return self._meter.read()

    def preview(self, request: RoutableRequest, *, now: float) -> Explanation:
        """What would be decided now. Changes nothing: it is a copy of the policy that is asked."""
        request = self._completed(request)
        explanation = self._explanation(request, now)
        try:
            policy = copy.deepcopy(self._policy)
        except Exception as exc:  # noqa: BLE001 - a user's own may hold anything
            explanation.refused_because = (
                f"the policy {self._policy_name!r} cannot be copied ({type(exc).__name__}), and asking it might change "
                "what it does next; give it a __deepcopy__"
            )
            return explanation
        view = self._fleet.view(request, {}, now, random.Random(0), len(self._queue) + 1, found_busy=self._found_busy)
        try:
            if view is None:
                raise self._fleet.refusal(request)
            decision = decide(policy, self._policy_name, request, view)
            explanation.candidates, explanation.chosen = decision.kept, decision.chosen
            explanation.held_because = decision.held_because
            slo_s = self._slo(request)
            if slo_s is not None:
                self._check_slo(decision.chosen, self._wait_s(request, decision.chosen, now), slo_s)
        except Rejected as exc:
            explanation.refused_because = str(exc)
        return explanation

    def _explanation(self, request: RoutableRequest, now: float) -> Explanation:
        return Explanation(
            request.request,
            self._policy_name,
            request.prompt_tokens,
            now,
            handover=request.handover,
            tenant=request.tenant,
            slo_ttft_s=request.slo_ttft_s,
            slo_itl_s=request.slo_itl_s,
            slo_ttft_from=_BY_NOBODY if request.slo_ttft_s is None else request.slo_ttft_from,
            slo_itl_from=_BY_NOBODY if request.slo_itl_s is None else request.slo_itl_from,
        )

    def stats(self, *, now: float) -> RouterStats:
        """Everything that metrics show of the router."""
        counts, models = self._counts, [worker.latency for worker in self._fleet.workers.values()]
        shadow = None
        if self._shadow is not None:
            shadow = ShadowStats(
                self._shadow_name,
                counts.shadow_decided,
                counts.shadow_differed,
                counts.shadow_faster_s,
                counts.shadow_failed,
            )
        oldest = next(self._queue.all(), None)
        return RouterStats(
            waiting=self._queue.depths(),
            oldest_wait_s=now - oldest.submitted_at if oldest is not None else 0.0,
            bound=len(self._bound),
            peers_bound=len(self._peers),
            index_blocks=len(self._fleet.index),
            index_fallback=self._fleet.index.fallback,
            inexact_workers=len(self._fleet.index.inexact()),
            decisions=dict(counts.decisions),
            local_decisions=counts.local,
            refusals=dict(counts.refusals),
            held=counts.held,
            prefill_error_ratio=_mean(model.prefill_error_ratio for model in models),
            step_error_ratio=_mean(model.step_error_ratio for model in models),
            handover_error_ratio=self._fleet.links.error_ratio(),
            ttft_error_ratio=counts.ttft_error_ratio,
            shadow=shadow,
            fairness=self._service.fairness(now=now),
        )

    def workers(self, *, now: float) -> list[WorkerStatus]:
        """Every registered worker as the router sees it."""
        return self._fleet.statuses(now)

    def links(self) -> list[LinkStatus]:
        """Every pair of workers that has handed over, and how fast."""
        return self._fleet.link_statuses()


class BindRate:
    """Requests bound per second, over about the last ten seconds."""

    def __init__(self) -> None:
        self._count = 0.0
        self._at: float | None = None
        self._since = 0.0

    def add(self, now: float) -> None:
        if self._at is None:
            self._since = now
        else:
            self._count *= math.exp((self._at - now) / _RATE_WINDOW_S)
        self._count += 1.0
        self._at = now

    def seconds_for(self, requests: float, now: float) -> float:
        """How long it takes to bind that many at this rate, 1 to 60."""
        if self._at is None:
            return 1.0
        window = _RATE_WINDOW_S * (1 - math.exp(-max(now - self._since, 1.0) / _RATE_WINDOW_S))
        rate = self._count * math.exp((self._at - now) / _RATE_WINDOW_S) / window
        return min(60.0, max(1.0, requests / rate)) if rate > 0 else 60.0


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if value]
    return sum(known) / len(known) if known else 0.0
