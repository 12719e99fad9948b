"""All workers as this gateway knows them, what they hold, and how fast they hand over to each other."""

import itertools
import math
import random
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from planes.wire.blocks import Hashes
from planes.wire.messages import (
    KvEvents,
    LatencyPrior,
    LoadReport,
    Registration,
    RequestBound,
    RequestId,
    WorkerId,
    WorkerState,
)
from router.errors import ContextTooLong, NoPair, NoWorker
from router.index.index import BlockIndex
from router.index.untold import UntoldBlocks
from router.links import LinkTable
from router.policy import NOBODY_HOPES, NOBODY_KNOWS, FleetView, HandoverGroup, Hopeful, WorkerView
from router.request import Candidate, HandoverPreference, Observed, RoutableRequest
from router.stats import LinkStatus, WorkerStatus
from router.worker import Reservation, Worker

_ALWAYS: Final = HandoverPreference.ALWAYS  # bound once, see CONTRIBUTING.md
_NEVER: Final = HandoverPreference.NEVER
_MAX_MATCHED: Final = 128  # a request is asked about as it comes and when it is bound, with others between the two


class _Serving:
    """Ready workers of one model and card."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.can_decode = any(worker.role.can_decode for worker in workers)
        self.least_context = min([worker.facts.context_length for worker in workers], default=0)


class _Matched:
    """What each worker holds of a prompt.

    held: as far as they have told, good until the index changes.  cached: with what they have not told yet, good until
    that changes as well.
    """

    def __init__(self, blocks: Hashes, held: dict[WorkerId, int]) -> None:
        self.blocks = blocks
        self.held = self.cached = held
        self.untold_changes = -1


_NONE = _Serving([])
_NOBODY: Mapping[WorkerId, int] = {}


class Fleet:
    """All registered workers, and what they hold."""

    def __init__(self) -> None:
        self.workers: dict[WorkerId, Worker] = {}
        self.index = BlockIndex()
        self.links = LinkTable()
        self.version = 0
        """Grows when workers come, go or change."""
        self.changes = 0
        """Grows with all that views are made from, the index apart."""
        self._departed: dict[WorkerId, Worker] = {}
        self._ready: dict[tuple[str, str, int], _Serving] = {}
        self._ready_version = -1
        self._untold = UntoldBlocks()
        self._matched: dict[RequestId, _Matched] = {}
        self._matched_at = -1
        """The index's `changes` then."""

    def up(self, registration: Registration) -> None:
        """Take in a new or changed registration; one of an older epoch is ignored."""
        name = registration.worker
        self.changes += 1
        known = self.workers.get(name)
        if known is not None and registration.epoch < known.registration.epoch:
            return
        if known is None or registration.epoch > known.registration.epoch:
            departed = self._departed.pop(name, None)
            if departed is not None and departed.registration.epoch == registration.epoch:
                known = departed  # its lease ran out, not its requests
            else:
                known = Worker(registration)
                self._untold.gone(name)
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
        self.changes += 1
        self.index.drop(name)
        self._untold.gone(name)
        self.links.drop(name)
        if worker.has_reservations:
            self._departed[name] = worker

    def apply_load(self, report: LoadReport, *, now: float, report_delay_s: float) -> None:
        worker = self.workers.get(report.worker)
        if worker is None or report.epoch != worker.registration.epoch:
            return
        self.changes += 1
        self.index.check(report)
        self._untold.forget(report.worker, now)
        if report.state is not worker.state:
            self.version += 1
        worker.apply_load(report, now=now, report_delay_s=report_delay_s)

    def apply_events(self, batch: KvEvents) -> None:
        self.index.apply(batch)
        self._untold.told(batch.worker, self.index.holds)

    # --- reservations --------------------------------------------------------------------------------------------

    def reserve(
        self, request: RoutableRequest, candidate: Candidate, now: float, due_at: float = math.inf
    ) -> Reservation:
        """due_at: when its first token should have come."""
        decoding = self.workers[candidate.decode]
        computing = decoding if candidate.prefill is None else self.workers[candidate.prefill]
        held_tokens = candidate.decode_cached_tokens
        if request.ends_with_prefill:  # the other one never hears of it
            decoding, held_tokens = computing, candidate.cached_tokens
        uncached_tokens = max(0, request.prompt_tokens - candidate.cached_tokens)
        reservation = Reservation(
            request=request.request,
            computing=computing,
            decoding=decoding,
            uncached_tokens=uncached_tokens,
            prompt_tokens=request.prompt_tokens,
            expected_tokens=request.expected_tokens,
            work_s=computing.latency.work_s(uncached_tokens, request.prompt_tokens),
            bound_at=now,
            decode_cached_tokens=held_tokens,
            prefill_due_at=due_at - (candidate.ttft_s - candidate.queue_s - candidate.prefill_s),
            slo_itl_s=request.slo_itl_s,
        )
        self._take(reservation, now)
        size = computing.facts.block_size
        if candidate.cached_tokens < (request.prompt_tokens - 1) // size * size:  # it has blocks to tell of
            self._untold.add(request.request, computing.worker, request.blocks)
        return reservation

    def reserve_told(self, told: RequestBound, now: float) -> Reservation | None:
        """Another gateway's request; its blocks are not told. None: one of its workers is not known here.

        What is too long for its worker is cut.
        """
        decoding = self.workers.get(told.decode)
        computing = decoding if told.prefill is None else self.workers.get(told.prefill)
        if decoding is None or computing is None:
            return None
        context = decoding.facts.context_length
        prompt_tokens = min(told.prompt_tokens, context)
        uncached_tokens = min(told.uncached_tokens, prompt_tokens)
        reservation = Reservation(
            request=told.request,
            computing=computing,
            decoding=decoding,
            uncached_tokens=uncached_tokens,
            prompt_tokens=prompt_tokens,
            expected_tokens=min(told.expected_tokens, context),
            work_s=computing.latency.work_s(uncached_tokens, prompt_tokens),
            bound_at=now - told.age_s,
            decode_cached_tokens=min(told.decode_cached_tokens, prompt_tokens),
            prefill_due_at=math.inf if told.due_in_s is None else now + told.due_in_s,
            slo_itl_s=told.slo_itl_s,
        )
        self._take(reservation, now)
        if told.is_prefilled:
            self._end_prefill(reservation, now)
        for worker in dict.fromkeys((computing, decoding)):
            worker.catch_up(reservation)
        return reservation

    def _take(self, reservation: Reservation, now: float) -> None:
        self.changes += 1
        reservation.computing.reserve_prefill(reservation, now)
        reservation.decoding.reserve_decode(reservation, now)
        if reservation.computing is reservation.decoding:
            reservation.decoding.arrived(reservation, now)

    def prefilled(self, reservation: Reservation, now: float) -> None:
        if not reservation.is_prefilled:
            computing = reservation.computing
            if self.workers.get(computing.worker) is computing:
                self._untold.computed(reservation.request, now)
            else:  # it tells of nothing any more
                self._untold.drop(reservation.request)
            self._end_prefill(reservation, now)

    def _end_prefill(self, reservation: Reservation, now: float) -> None:
        self.changes += 1
        reservation.is_prefilled = True
        reservation.computing.release_prefill(reservation, now)
        reservation.decoding.arrived(reservation, now)
        reservation.decoding.prefilled(reservation, now)

    def release(self, reservation: Reservation, completion_tokens: int, now: float) -> None:
        self.changes += 1
        if not reservation.is_prefilled:
            self._untold.drop(reservation.request)
            self._end_prefill(reservation, now)
        reservation.decoding.release_decode(reservation, completion_tokens)
        for worker in (reservation.computing, reservation.decoding):
            if self._departed.get(worker.worker) is worker and not worker.has_reservations:
                del self._departed[worker.worker]

    # --- views ---------------------------------------------------------------------------------------------------

    def eligible(self, request: RoutableRequest) -> list[Worker]:
        """Workers that may take the request: ready, of its model and card, with room for its context, not excluded."""
        serving = self._serving(request)
        if request.excluded or request.max_context > serving.least_context:
            return [
                worker
                for worker in serving.workers
                if worker.worker not in request.excluded and worker.facts.context_length >= request.max_context
            ]
        return serving.workers

    def can_serve(self, request: RoutableRequest) -> bool:
        """Whether any worker that may take the request can decode; as the client wants it, with a handover."""
        if request.handover is _ALWAYS:
            return bool(_pairable(self.eligible(request)))
        serving = self._serving(request)
        if not request.excluded and request.max_context <= serving.least_context:
            return serving.can_decode
        return any(worker.role.can_decode for worker in self.eligible(request))

    def refusal(self, request: RoutableRequest) -> NoWorker | NoPair:
        """Why `can_serve` says no."""
        deciding = [worker for worker in self._serving(request).workers if worker.role.can_decode]
        longest = max([worker.facts.context_length for worker in deciding], default=0)
        if 0 < longest < request.max_context:
            return ContextTooLong(request.model, request.max_context, longest=longest, num_workers=len(deciding))
        error = NoPair if request.handover is _ALWAYS else NoWorker
        return error(request.model, num_workers=len(self.workers), card_digest=request.card_digest)

    def _serving(self, request: RoutableRequest) -> "_Serving":
        """The ready workers of the request's model, card and adapter; found anew when the fleet has changed."""
        if self._ready_version != self.version:
            self._ready_version = self.version
            groups: dict[tuple[str, str, int], list[Worker]] = {}
            for worker in self.workers.values():
                if worker.is_ready:
                    model, card = worker.registration.model, worker.registration.card_digest
                    loaded = [number for number, refusal in worker.registration.adapters.items() if not refusal]
                    for own, adapter in itertools.product(dict.fromkeys((card, "")), (0, *loaded)):
                        groups.setdefault((model, own, adapter), []).append(worker)
            self._ready = {key: _Serving(workers) for key, workers in groups.items()}
        return self._ready.get((request.model, request.card_digest, request.adapter), _NONE)

    def cached_blocks(self, request: RoutableRequest) -> Mapping[WorkerId, int]:
        """Leading blocks held, or soon held by a prompt with the same beginning that was sent there."""
        if self._matched_at != self.index.changes or len(self._matched) >= _MAX_MATCHED:
            self._matched_at = self.index.changes
            self._matched.clear()
        blocks, matched = request.blocks, self._matched.get(request.request)
        if matched is None or matched.blocks is not blocks:
            matched = self._matched[request.request] = _Matched(blocks, self.index.match(blocks))
        if matched.untold_changes != self._untold.changes:
            matched.untold_changes = self._untold.changes
            matched.cached = matched.held.copy()
            for name, depth in self._untold.match(blocks).items():
                if depth > matched.cached.get(name, 0):
                    matched.cached[name] = depth
        return matched.cached

    def view(
        self,
        request: RoutableRequest,
        ahead: Mapping[WorkerId, float],
        now: float,
        rng: random.Random,
        num_waiting: int = 0,
        *,
        waited_s: float = 0.0,
        hopeful: Hopeful = NOBODY_HOPES,
        makes_way: bool = False,
        lets_pass: bool = False,
        without_room: Mapping[WorkerId, int] = _NOBODY,
        waiting_shares: Mapping[WorkerId, float] = NOBODY_KNOWS,
        found_busy: float = 1.0,
    ) -> FleetView | None:
        """The workers that may serve a request; None if `can_serve` says no. A `both` worker is one view in both lists.

        ahead: seconds of work per worker that the gateway's queue holds before this request; without_room: requests
        there that wait for room to decode.
        """
        cached = self.cached_blocks(request)
        prefill: list[WorkerView] = []
        decode: list[WorkerView] = []
        workers = self.eligible(request)
        if request.handover is _ALWAYS:
            workers = _pairable(workers)
        is_local = request.is_local_only or request.handover is _NEVER
        for worker in workers:
            name, role, cached_tokens = worker.worker, worker.role, 0
            size = worker.facts.block_size
            if name in cached and request.block_size in (0, size):
                cached_tokens = min(cached[name], (request.prompt_tokens - 1) // size) * size
            view = worker.view(
                cached_tokens,
                request.prompt_tokens,
                self.index.num_cached(name),
                ahead.get(name, 0.0),
                now,
                without_room.get(name, 0),
            )
            if role.can_prefill and not is_local:
                prefill.append(view)
            if role.can_decode:
                decode.append(view)
        if not decode:
            return None
        return FleetView(
            prefill=tuple(prefill),
            decode=tuple(decode),
            links=self.links,
            now=now,
            rng=rng,
            num_waiting=num_waiting,
            waited_s=waited_s,
            hopeful=hopeful,
            makes_way=makes_way,
            lets_pass=lets_pass,
            waiting_shares=waiting_shares,
            found_busy=found_busy,
        )

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
                indexed_blocks=self.index.num_cached(name),
                is_exact=self.index.is_exact(name),
                utilisation=worker.utilisation.computing,
                speed=worker.latency.speed,
                reported_s=None if worker.reported_at is None else now - worker.reported_at,
                latency=self._learned(worker),
                num_samples=worker.latency.num_samples,
            )
            for name, worker in self.workers.items()
        ]

    def _learned(self, worker: Worker) -> LatencyPrior:
        link = self.links.sender(worker.worker)
        return msgspec.structs.replace(
            worker.latency.learned, handover_fixed_s=link.fixed_s, handover_bytes_per_s=link.bytes_per_s
        )

    def link_statuses(self) -> list[LinkStatus]:
        return self.links.statuses()


def _pairable(workers: Iterable[Worker]) -> list[Worker]:
    """Those that can hand over to another one of them, or take from one."""
    groups: dict[HandoverGroup, list[Worker]] = {}
    for worker in workers:
        if worker.handover is not None:
            groups.setdefault(worker.handover, []).append(worker)
    found: list[Worker] = []
    for able in groups.values():
        senders = [worker for worker in able if worker.role.can_prefill]
        receivers = [worker for worker in able if worker.role.can_decode]
        if senders and receivers and len({worker.worker for worker in senders + receivers}) > 1:
            found += able
    return found
