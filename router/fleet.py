"""The workers as this gateway knows them: registrations, load, reservations.

**Load: the last report plus our own dispatches since, none counted twice.** A report counts every gateway's requests,
ours among them. Whether it counts one that we sent shortly before it came cannot be told for sure; we take those sent
more than `report_delay_s` before as counted (*seen*) and add the others (*unseen*) to its figures. So

    prompt work   = reported + unseen prompts                        seen prompts that end are taken off the report
    sequences, KV = reported + unseen decode legs                    a decode leg can be seen once it has arrived:
                                                                     at dispatch (local), after the prefill (pair)

Whatever we took for seen and was not yet in the report is missing until the next one (100 ms while busy); the delay is
chosen so that the other mistake, counting twice for one report, is the likelier: it holds back, and herds nobody.

Between reports prompt work drains like a fluid: a worker is busy until the instant `busy_until`, each prompt we send
moves it on by its predicted seconds, each report sets it anew.
"""

import math
import random
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from planes.blocks import Hashes
from planes.messages import HandoverMode, LatencyPrior, LoadReport, Registration, RequestId, WorkerId, WorkerState
from router.explain import WorkerStatus
from router.index import BlockIndex
from router.latency import LatencyModel, LinkModel
from router.policy import FleetView, WorkerView
from router.request import Candidate, HandoverWish, Observed, RoutableRequest

_WINDOW_S = 60.0  # over which utilisation is averaged
_LATE_SHARE = 0.1  # of outstanding prompt work still to come when it has taken longer than predicted
_MAX_SHARING = 64  # prompts under way with the same first block that a new one is compared with


@dataclass(slots=True)
class Reservation:
    """What a bound request takes on its workers until it is released. `computing` is `decoding` for a local one."""

    request: RequestId
    computing: "Worker"
    decoding: "Worker"
    blocks: Hashes
    uncached_tokens: int
    prompt_tokens: int
    expected_tokens: int
    prefill_s: float
    bound_at: float
    is_prefilled: bool = False
    prefill_seen: bool = False
    decode_seen: bool = False
    arrived_at: float = math.inf
    """When its decode leg reached the decode worker."""


class Worker:
    """One worker: registration, last report, own dispatches."""

    def __init__(self, registration: Registration) -> None:
        self.worker = registration.worker
        self.register(registration)
        self.latency = LatencyModel(registration.facts.latency, registration.facts.max_step_tokens)
        self.reported_at: float | None = None
        self.num_running = 0
        self.num_waiting = 0
        self.waiting_prefill_tokens = 0
        self.kv_tokens = 0
        self.free_blocks = registration.facts.num_blocks
        self.busy_until = 0.0
        self.utilisation = Utilisation()
        self.has_steps = False
        """Its reports tell of engine steps; if not, whole prefills have to teach the latency model."""
        self.computing: dict[RequestId, Reservation] = {}
        self.decoding: dict[RequestId, Reservation] = {}
        self._sent: deque[Reservation] = deque()
        self._arrived: deque[Reservation] = deque()
        self.unseen_prefills = self.unseen_prefill_tokens = 0
        self.unseen_decodes = self.unseen_kv_tokens = self.unseen_blocks = 0
        self.seen_tokens = self.seen_prompt_tokens = 0
        self.seen_s = 0.0

    def register(self, registration: Registration) -> None:
        """Take over a changed registration of the same epoch."""
        self.registration = registration
        self.role, self.facts = registration.role, registration.facts
        endpoint = registration.handover
        self.handover: HandoverMode | None = endpoint.mode if endpoint is not None else None
        self.state = registration.state

    @property
    def is_ready(self) -> bool:
        return self.state is WorkerState.READY and self.registration.state is WorkerState.READY

    @property
    def has_reservations(self) -> bool:
        return bool(self.computing or self.decoding)

    # --- reservations --------------------------------------------------------------------------------------------

    def reserve_prefill(self, reservation: Reservation, now: float) -> None:
        self.computing[reservation.request] = reservation
        self._sent.append(reservation)
        self.unseen_prefills += 1
        self.unseen_prefill_tokens += reservation.uncached_tokens
        self.busy_until = max(self.busy_until, now) + reservation.prefill_s

    def reserve_decode(self, reservation: Reservation) -> None:
        self.decoding[reservation.request] = reservation
        self.unseen_decodes += 1
        self.unseen_kv_tokens += reservation.prompt_tokens
        self.unseen_blocks += self._blocks(reservation)

    def arrived(self, reservation: Reservation, now: float) -> None:
        """The decode leg is with the worker and will be in its reports."""
        if reservation.arrived_at == math.inf:
            reservation.arrived_at = now
            self._arrived.append(reservation)

    def release_prefill(self, reservation: Reservation, now: float) -> None:
        if self.computing.pop(reservation.request, None) is None:
            return
        if reservation.prefill_seen:
            self.waiting_prefill_tokens = max(0, self.waiting_prefill_tokens - reservation.uncached_tokens)
            self.seen_tokens -= reservation.uncached_tokens
            self.seen_prompt_tokens -= reservation.prompt_tokens
            self.seen_s = self.seen_s - reservation.prefill_s if self.seen_tokens else 0.0
        else:
            self.unseen_prefills -= 1
            self.unseen_prefill_tokens -= reservation.uncached_tokens
        if not self.computing and not self.waiting_prefill_tokens:
            self.busy_until = min(self.busy_until, now)

    def release_decode(self, reservation: Reservation, completion_tokens: int) -> None:
        if self.decoding.pop(reservation.request, None) is None:
            return
        if reservation.decode_seen:
            self.num_running = max(0, self.num_running - 1)
            self.kv_tokens = max(0, self.kv_tokens - reservation.prompt_tokens - completion_tokens)
            self.free_blocks = min(self.registration.facts.num_blocks, self.free_blocks + self._blocks(reservation))
        else:
            self.unseen_decodes -= 1
            self.unseen_kv_tokens -= reservation.prompt_tokens
            self.unseen_blocks -= self._blocks(reservation)

    def _blocks(self, reservation: Reservation) -> int:
        return -(-(reservation.prompt_tokens + reservation.expected_tokens) // self.registration.facts.block_size)

    # --- reports -------------------------------------------------------------------------------------------------

    def apply_load(self, report: LoadReport, *, now: float, report_delay_s: float) -> None:
        counted = now - report_delay_s
        while self._sent and self._sent[0].bound_at <= counted:
            self._see_prefill(self._sent.popleft())
        while self._arrived and self._arrived[0].arrived_at <= counted:
            self._see_decode(self._arrived.popleft())
        self.latency.learn(report.steps)
        self.has_steps = self.has_steps or bool(report.steps)
        self.state = report.state
        self.num_running, self.num_waiting = report.num_running, report.num_waiting
        self.waiting_prefill_tokens = report.waiting_prefill_tokens
        self.kv_tokens, self.free_blocks = report.kv_tokens, report.free_blocks
        unseen_s = sum(sent.prefill_s for sent in self._sent if sent.request in self.computing)
        self.busy_until = now + self._reported_work_s(report) + unseen_s
        self.utilisation.add(report, self.latency, now - self.reported_at if self.reported_at is not None else 0.0)
        self.reported_at = now

    def _see_prefill(self, reservation: Reservation) -> None:
        if self.computing.get(reservation.request) is reservation:
            reservation.prefill_seen = True
            self.unseen_prefills -= 1
            self.unseen_prefill_tokens -= reservation.uncached_tokens
            self.seen_tokens += reservation.uncached_tokens
            self.seen_prompt_tokens += reservation.prompt_tokens
            self.seen_s += reservation.prefill_s

    def _see_decode(self, reservation: Reservation) -> None:
        if self.decoding.get(reservation.request) is reservation:
            reservation.decode_seen = True
            self.unseen_decodes -= 1
            self.unseen_kv_tokens -= reservation.prompt_tokens
            self.unseen_blocks -= self._blocks(reservation)

    def _reported_work_s(self, report: LoadReport) -> float:
        """Seconds of prompt work in a report: our own part of it at its predicted cost, the rest by the token.

        An engine that has not looked a prompt up in its cache yet reports all of it, so our part is anything between
        our uncached tokens and our prompts' tokens.
        """
        tokens = report.waiting_prefill_tokens
        own_s = self.seen_s * min(1.0, tokens / self.seen_tokens) if self.seen_tokens else 0.0
        others = tokens - max(self.seen_prompt_tokens, self.seen_tokens)
        if others <= 0:
            return own_s
        mean = others // max(1, report.num_waiting - len(self.computing)) or 1
        return own_s + self.latency.prefill_s(mean, mean) * others / mean

    # --- answers -------------------------------------------------------------------------------------------------

    def backlog_s(self, now: float) -> float:
        """Predicted seconds until a prompt sent now would begin to be computed."""
        backlog = self.busy_until - now
        if backlog <= 0 and self.computing:  # it is late: something is left, nobody knows how much
            return _LATE_SHARE * max(reservation.prefill_s for reservation in self.computing.values())
        return max(0.0, backlog)

    def view(self, cached_tokens: int, ahead_s: float, now: float) -> WorkerView:
        used = self.utilisation
        free_blocks = self.free_blocks - self.unseen_blocks
        return WorkerView(
            self.worker,
            self.role,
            self.facts,
            self.latency,
            cached_tokens,
            self.num_running + self.unseen_decodes,
            self.num_waiting + self.unseen_prefills,
            self.waiting_prefill_tokens + self.unseen_prefill_tokens,
            self.backlog_s(now) + ahead_s,
            self.kv_tokens + self.unseen_kv_tokens,
            free_blocks if free_blocks > 0 else 0,  # noqa: FURB136 - max() takes three times as long here
            used.computing,
            self.handover,
            used.prefilling,
            used.running,
        )


class Utilisation:
    """How busy a worker was over about the last minute; starts as if it had been idle for ten seconds.

    computing, prefilling: shares of the time, 0.0 to 1.0.  running: mean number of sequences.
    """

    def __init__(self) -> None:
        self.computing = self.prefilling = self.running = 0.0
        self._weight = 1 - math.exp(-10 / _WINDOW_S)

    def add(self, report: LoadReport, latency: LatencyModel, elapsed_s: float) -> None:
        if elapsed_s <= 0:
            return
        computing = sum(step.duration_s for step in report.steps)
        prefilling = sum(
            max(0.0, step.duration_s - (latency.step_s(step.batch, step.kv_tokens) if step.batch else 0.0))
            for step in report.steps
            if step.prefill_tokens
        )
        if not report.steps and report.num_running:
            computing = elapsed_s
        old = math.exp(-elapsed_s / _WINDOW_S)
        weight = self._weight * old + 1 - old
        new = (1 - old) / weight
        self._weight = weight
        self.computing += new * (_share(computing, elapsed_s) - self.computing)
        self.prefilling += new * (_share(prefilling, elapsed_s) - self.prefilling)
        self.running += new * (min(report.num_running, 1 << 20) - self.running)


def _share(part_s: float, whole_s: float) -> float:
    return min(1.0, max(0.0, part_s / whole_s)) if math.isfinite(part_s) else 0.0


class LinkTable:
    """Handover speeds: a model for each pair that has handed over, and one per prefill worker for all other pairs."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[WorkerId, WorkerId], LinkModel] = {}
        self._senders: dict[WorkerId, LinkModel] = {}
        self._priors: dict[WorkerId, LatencyPrior] = {}

    def add(self, prefill: WorkerId, prior: LatencyPrior) -> None:
        self._priors[prefill] = prior
        self._senders[prefill] = LinkModel(prior)

    def drop(self, worker: WorkerId) -> None:
        self._priors.pop(worker, None)
        self._senders.pop(worker, None)
        for pair in [pair for pair in self._pairs if worker in pair]:
            del self._pairs[pair]

    def link(self, prefill: WorkerId, decode: WorkerId) -> LinkModel:
        model = self._pairs.get((prefill, decode)) or self._senders.get(prefill)
        return model if model is not None else LinkModel(LatencyPrior())

    def learn(self, prefill: WorkerId, decode: WorkerId, num_bytes: int, seconds: float) -> None:
        """Take in a handover between two workers; ignored if the sender is gone."""
        prior = self._priors.get(prefill)
        if prior is None:
            return
        pair = self._pairs.get((prefill, decode))
        if pair is None:
            pair = self._pairs[prefill, decode] = LinkModel(prior)
        pair.learn(num_bytes, seconds)
        self._senders[prefill].learn(num_bytes, seconds)

    def error_ratio(self) -> float:
        """Mean over the prefill workers that have handed anything over."""
        errors = [model.error_ratio for model in self._senders.values() if model.error_ratio]
        return sum(errors) / len(errors) if errors else 0.0


class Fleet:
    """All registered workers, and what they hold."""

    def __init__(self) -> None:
        self.workers: dict[WorkerId, Worker] = {}
        self.index = BlockIndex()
        self.links = LinkTable()
        self.version = 0
        """Grows when workers come, go or change."""
        self._departed: dict[WorkerId, Worker] = {}
        self._ready: dict[str, list[Worker]] = {}
        self._ready_version = -1
        self._computing: dict[int, dict[RequestId, Reservation]] = {}

    def up(self, registration: Registration) -> None:
        """Take in a new or changed registration; one of an older epoch is ignored."""
        name = registration.worker
        known = self.workers.get(name)
        if known is not None and registration.epoch < known.registration.epoch:
            return
        if known is None or registration.epoch > known.registration.epoch:
            departed = self._departed.pop(name, None)
            if departed is not None and departed.registration.epoch == registration.epoch:
                known = departed  # its lease ran out, not its requests
            else:
                known = Worker(registration)
            self.workers[name] = known
            self.links.drop(name)
            self.links.add(name, registration.facts.latency)
        self.version += 1
        known.register(registration)
        self.index.add(name, registration.epoch, registration.facts.num_blocks)

    def down(self, name: WorkerId) -> None:
        worker = self.workers.pop(name, None)
        if worker is None:
            return
        self.version += 1
        self.index.drop(name)
        self.links.drop(name)
        if worker.has_reservations:
            self._departed[name] = worker

    def apply_load(self, report: LoadReport, *, now: float, report_delay_s: float) -> None:
        worker = self.workers.get(report.worker)
        if worker is None or report.epoch != worker.registration.epoch:
            return
        self.index.check(report)
        if report.state is not worker.state:
            self.version += 1
        worker.apply_load(report, now=now, report_delay_s=report_delay_s)

    # --- reservations --------------------------------------------------------------------------------------------

    def reserve(self, request: RoutableRequest, candidate: Candidate, now: float) -> Reservation:
        decoding = self.workers[candidate.decode]
        computing = decoding if candidate.prefill is None else self.workers[candidate.prefill]
        reservation = Reservation(
            request.request,
            computing,
            decoding,
            request.blocks,
            max(0, request.prompt_tokens - candidate.cached_tokens),
            request.prompt_tokens,
            request.expected_tokens,
            candidate.prefill_s,
            now,
        )
        computing.reserve_prefill(reservation, now)
        decoding.reserve_decode(reservation)
        if candidate.prefill is None:
            decoding.arrived(reservation, now)
        if len(request.blocks):
            self._computing.setdefault(int(request.blocks[0]), {})[request.request] = reservation
        return reservation

    def prefilled(self, reservation: Reservation, now: float) -> None:
        if reservation.is_prefilled:
            return
        reservation.is_prefilled = True
        reservation.computing.release_prefill(reservation, now)
        reservation.decoding.arrived(reservation, now)
        if len(reservation.blocks):
            first = int(reservation.blocks[0])
            sharing = self._computing.get(first)
            if sharing is not None:
                sharing.pop(reservation.request, None)
                if not sharing:
                    del self._computing[first]

    def release(self, reservation: Reservation, completion_tokens: int, now: float) -> None:
        self.prefilled(reservation, now)
        reservation.decoding.release_decode(reservation, completion_tokens)
        for worker in (reservation.computing, reservation.decoding):
            if self._departed.get(worker.worker) is worker and not worker.has_reservations:
                del self._departed[worker.worker]

    # --- views ---------------------------------------------------------------------------------------------------

    def eligible(self, request: RoutableRequest) -> list[Worker]:
        """Workers that may take the request: ready, of its model, not excluded."""
        if self._ready_version != self.version:
            self._ready_version = self.version
            self._ready = {}
            for worker in self.workers.values():
                if worker.is_ready:
                    self._ready.setdefault(worker.registration.model, []).append(worker)
        ready = self._ready.get(request.model, [])
        if request.excluded:
            return [worker for worker in ready if worker.worker not in request.excluded]
        return ready

    def can_serve(self, request: RoutableRequest) -> bool:
        """Whether any worker that may take the request can decode; as the client wants it, with a handover."""
        if request.handover is HandoverWish.ALWAYS:
            return bool(_pairable(self.eligible(request)))
        return any(worker.role.can_decode for worker in self.eligible(request))

    def cached_blocks(self, request: RoutableRequest) -> dict[WorkerId, int]:
        """Leading blocks held, or soon held because a prompt with the same beginning is being computed there."""
        cached = self.index.match(request.blocks)
        if len(request.blocks):
            sharing = self._computing.get(int(request.blocks[0]))
            if sharing:
                for reservation in _last(sharing.values()):
                    name = reservation.computing.worker
                    shared = min(len(reservation.blocks), len(request.blocks))
                    # Names are chained: equal ones are a leading run.
                    depth = int(np.count_nonzero(reservation.blocks[:shared] == request.blocks[:shared]))
                    if depth > cached.get(name, 0):
                        cached[name] = depth
        return cached

    def view(
        self,
        request: RoutableRequest,
        ahead: Mapping[WorkerId, float],
        now: float,
        rng: random.Random,
        num_waiting: int = 0,
    ) -> FleetView | None:
        """The workers that may serve a request; None if `can_serve` says no. A `both` worker is one view in both lists.

        ahead: seconds of work per worker that the gateway's queue holds before this request.
        """
        cached = self.cached_blocks(request)
        prefill: list[WorkerView] = []
        decode: list[WorkerView] = []
        workers = self.eligible(request)
        if request.handover is HandoverWish.ALWAYS:
            workers = _pairable(workers)
        is_local = request.is_local_only or request.handover is HandoverWish.NEVER
        for worker in workers:
            name, role, cached_tokens = worker.worker, worker.role, 0
            if name in cached:
                size = worker.facts.block_size
                cached_tokens = min(cached[name], (request.prompt_tokens - 1) // size) * size
            view = worker.view(cached_tokens, ahead.get(name, 0.0), now)
            if role.can_prefill and not is_local:
                prefill.append(view)
            if role.can_decode:
                decode.append(view)
        return FleetView(prefill, decode, self.links, now, rng, num_waiting) if decode else None

    def learn(self, reservation: Reservation, observed: Observed) -> None:
        """Take in what happened to a request. Where steps are reported they teach more than whole prefills do."""
        computing, decoding = reservation.computing, reservation.decoding
        if observed.prefill is not None:
            taken_by = self.workers.get(observed.prefill)
            if taken_by is None:
                return
            computing = taken_by
        if observed.prefill_s is not None and not computing.has_steps:
            uncached = reservation.prompt_tokens - (observed.cached_tokens or 0)
            computing.latency.learn_prefill(uncached, reservation.prompt_tokens, observed.prefill_s)
        if computing is not decoding and observed.handover_s is not None and observed.handover_bytes:
            self.links.learn(computing.worker, decoding.worker, observed.handover_bytes, observed.handover_s)

    def statuses(self, now: float) -> list[WorkerStatus]:
        return [
            WorkerStatus(
                worker=name,
                role=worker.registration.role,
                model=worker.registration.model,
                state=WorkerState.READY if worker.is_ready else WorkerState.DRAINING,
                num_running=worker.num_running + worker.unseen_decodes,
                num_waiting=worker.num_waiting + worker.unseen_prefills,
                waiting_prefill_tokens=worker.waiting_prefill_tokens + worker.unseen_prefill_tokens,
                queue_s=worker.backlog_s(now),
                kv_tokens=worker.kv_tokens + worker.unseen_kv_tokens,
                free_blocks=max(0, worker.free_blocks - worker.unseen_blocks),
                num_blocks=worker.registration.facts.num_blocks,
                indexed_blocks=self.index.num_held(name),
                is_exact=self.index.is_exact(name),
                utilisation=worker.utilisation.computing,
                speed=worker.latency.speed,
                reported_s=None if worker.reported_at is None else now - worker.reported_at,
            )
            for name, worker in self.workers.items()
        ]


def _pairable(workers: Iterable[Worker]) -> list[Worker]:
    """Those that can hand over to another one of them, or take from one."""
    found: list[Worker] = []
    for mode in HandoverMode:
        able = [worker for worker in workers if worker.handover is mode]
        givers = [worker for worker in able if worker.role.can_prefill]
        takers = [worker for worker in able if worker.role.can_decode]
        if givers and takers and len({worker.worker for worker in givers + takers}) > 1:
            found += able
    return found


def _last(reservations: Iterable[Reservation]) -> list[Reservation]:
    return list(reservations)[-_MAX_SHARING:]
