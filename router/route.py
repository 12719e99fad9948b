"""The router: one object that decides and reserves in the same step. No I/O; every method takes `now` in seconds.

This file is the contract that the gateway and the simulator are written against; see `docs/adr/` for why it queues.
"""

import random
from collections import OrderedDict
from dataclasses import dataclass

from planes.errors import Rejected
from planes.messages import KvEvents, LoadReport, Registration, RequestId, Snapshot, WorkerId
from router import predict
from router.errors import DeadlineExceeded, DuplicateRequest, NoWorker, QueueFull
from router.fleet import Fleet, Reservation
from router.policies.headrace import Headrace
from router.policy import Choice, FleetView, Policy
from router.request import Candidate, Explanation, Observed, RoutableRequest, Route
from router.settings import RouterSettings


@dataclass(frozen=True, slots=True)
class Refusal:
    """A queued request that will not be served; `error` says why."""

    request: RequestId
    error: Rejected


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
        self._settings = settings or RouterSettings()
        self._policy = policy or Headrace()
        self._shadow = shadow
        self._rng = rng or random.Random(0)
        self._fleet = Fleet()
        self._waiting: dict[RequestId, tuple[RoutableRequest, float]] = {}
        self._bound: dict[RequestId, Reservation] = {}
        self._history: OrderedDict[RequestId, Explanation] = OrderedDict()

    def configure(self, settings: RouterSettings, policy: Policy, *, shadow: Policy | None = None, now: float) -> None:
        """Change settings and policies; waiting requests stay and are decided anew at the next `dispatch`."""
        del now
        self._settings, self._policy, self._shadow = settings, policy, shadow

    # --- the fleet: control and event plane ---------------------------------------------------------------------

    def worker_up(self, registration: Registration, *, now: float) -> None:
        """A worker registered or changed its registration. A new epoch forgets everything about the old one."""
        del now
        self._fleet.up(registration)

    def worker_down(self, worker: WorkerId, *, now: float) -> None:
        """A worker's registration is gone, or its stream was found dead. Its reservations stay until released."""
        del now
        self._fleet.down(worker)

    def apply_events(self, batch: KvEvents, *, now: float) -> None:
        """Apply one publication; duplicates, gaps and foreign epochs are noticed here and healed by a snapshot."""
        del now
        self._fleet.index.apply(batch)

    def apply_snapshot(self, snapshot: Snapshot, *, now: float) -> None:
        """Replace what is known of a worker's blocks."""
        del now
        self._fleet.index.apply_snapshot(snapshot)

    def apply_load(self, report: LoadReport, *, now: float) -> None:
        """Take over a load report; a digest that differs from our copy's marks the worker for a snapshot."""
        self._fleet.apply_load(report, now=now, report_delay_s=self._settings.report_delay_s)

    def workers_to_snapshot(self) -> list[WorkerId]:
        """Workers whose blocks we do not know for sure. Stays so until `apply_snapshot`; the caller paces itself."""
        return self._fleet.index.inexact()

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: RoutableRequest, *, now: float) -> None:
        """Queue a request; call `dispatch` next.

        Raises:  QueueFull, SloMissed, NoWorker, DuplicateRequest (all Rejected): the request is not queued.
        """
        if request.request in self._waiting or request.request in self._bound:
            raise DuplicateRequest(request.request)
        if len(self._waiting) >= self._settings.queue_limit:
            raise QueueFull(len(self._waiting), self._settings.queue_limit, retry_after_s=1.0)
        if not any(worker.registration.role.can_decode for worker in self._fleet.eligible(request)):
            raise NoWorker(request.model, num_workers=len(self._fleet.workers))
        self._waiting[request.request] = (request, now)
        self._remember(Explanation(request.request, self._policy.name, request.prompt_tokens, now))

    def dispatch(self, *, now: float) -> list[Route | Refusal]:
        """Bind every request whose time has come, and reserve for it. Call after anything changed, and at `wakeup`."""
        answers: list[Route | Refusal] = []
        for request, submitted_at in list(self._waiting.values()):
            answer = self._decide(request, submitted_at, now)
            if answer is not None:
                del self._waiting[request.request]
                answers.append(answer)
        return answers

    def _decide(self, request: RoutableRequest, submitted_at: float, now: float) -> Route | Refusal | None:
        if now >= request.deadline:
            return Refusal(request.request, DeadlineExceeded(now - submitted_at))
        view = self._view(request, now)
        if view is None:
            return Refusal(request.request, NoWorker(request.model, num_workers=len(self._fleet.workers)))
        choice = self._policy.choose(request, view)
        explanation = self._history.get(request.request)
        if explanation is not None:
            explanation.candidates, explanation.chosen = choice.candidates, choice.chosen
            explanation.held_s, explanation.held_because = now - submitted_at, choice.held_because
        if choice.is_held:
            return None
        chosen = _honest(request, choice, view)
        self._bound[request.request] = self._fleet.reserve(request, chosen, now)
        return Route(
            request.request,
            chosen.prefill,
            chosen.decode,
            chosen.cached_tokens,
            chosen.decode_cached_tokens,
            chosen,
            self._policy.name,
            now - submitted_at,
        )

    def _view(self, request: RoutableRequest, now: float) -> FleetView | None:
        prefill, decode = self._fleet.views(request, {}, now)
        return FleetView(prefill, decode, self._fleet.links, now, self._rng) if decode else None

    def wakeup(self) -> float | None:
        """The instant at which `dispatch` should run though nothing else happened; None: no need."""
        if not self._waiting:
            return None
        deadline = min(request.deadline for request, _ in self._waiting.values())
        return min([deadline, *(worker.busy_until for worker in self._fleet.workers.values())])

    def withdraw(self, request: RequestId, *, now: float) -> None:
        """The client of a queued request went away. Unknown ids are ignored (it may just have been bound)."""
        del now
        self._waiting.pop(request, None)

    def prefilled(self, request: RequestId, *, now: float) -> None:
        """The prompt has been computed (prefill leg answered, or a local first token came): frees prefill load."""
        reservation = self._bound.get(request)
        if reservation is not None:
            self._fleet.prefilled(reservation, now)

    def release(self, request: RequestId, observed: Observed, *, now: float) -> None:
        """Give back the reservation of a bound request, exactly once, and learn from it. Raises KeyError if unbound."""
        reservation = self._bound.pop(request)
        self._fleet.release(reservation, observed.completion_tokens, now)
        explanation = self._history.get(request)
        if explanation is not None:
            explanation.observed = observed

    # --- answers about itself --------------------------------------------------------------------------------------

    def explain(self, request: RequestId) -> Explanation | None:
        """What was decided for a recent request, and what came of it."""
        return self._history.get(request)

    def preview(self, request: RoutableRequest, *, now: float) -> Explanation:
        """What would be decided now. Changes nothing."""
        explanation = Explanation(request.request, self._policy.name, request.prompt_tokens, now)
        view = self._view(request, now)
        if view is None:
            error = NoWorker(request.model, num_workers=len(self._fleet.workers))
            explanation.refused_because = str(error)
            return explanation
        choice = self._policy.choose(request, view)
        explanation.candidates, explanation.chosen = choice.candidates, choice.chosen
        explanation.held_because = choice.held_because
        return explanation

    def _remember(self, explanation: Explanation) -> None:
        self._history[explanation.request] = explanation
        while len(self._history) > self._settings.history:
            self._history.popitem(last=False)


def _honest(request: RoutableRequest, choice: Choice, view: FleetView) -> Candidate:
    """The chosen candidate with predicted seconds, which published rules leave out."""
    chosen = choice.chosen
    decode = next(worker for worker in view.decode if worker.worker == chosen.decode)
    if chosen.prefill is not None:
        prefill = next(worker for worker in view.prefill if worker.worker == chosen.prefill)
        if predict.can_hand_over(prefill, decode):
            return predict.pair(request, prefill, decode, view)
    return predict.local(request, decode)
