"""One worker as this gateway knows it: registration, load, reservations.

**Load: the last report plus our own dispatches since, none counted twice.** A report counts every gateway's requests,
ours among them. Whether it counts one that we sent shortly before it came cannot be told for sure; we take those sent
more than `report_delay_s` before as counted (*seen*) and add the others (*unseen*) to its figures. So

    prompt work   = reported + unseen prompts                        seen prompts that end are taken off the report
    sequences, KV = reported + unseen decode legs                    a decode leg can be seen once it has arrived:
                                                                     at dispatch (local), after the prefill (pair)

Whatever we took for seen and was not yet in the report is missing until the next one (100 ms while busy). Prompt tokens
in a report beyond what we have seen are our unseen ones as far as those go, and only then another gateway's.

Between reports prompt work is done in steps as `router/steps.py` plans them; each report sets the plan right.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass

from planes.wire.messages import HandoverMode, LoadReport, Registration, RequestId, WorkerState
from router.latency import LatencyModel, is_plausible
from router.policy import HandoverGroup, WorkerView
from router.steps import Pace, StepPlan

_PUSH_S = 10.0  # a WRITE must begin within 30 s of its decode leg, and predictions err
_WINDOW_S = 60.0  # over which utilisation is averaged
_SOME = 64  # that have ended may be remembered, beside as many as are there
_LATE_SHARE = 0.1  # of prompt work still to come when it has taken longer than predicted; of an answer, at least
_SEATS_S = 0.5  # so old may be what is known of the batch's places: it costs as much as there are streams


@dataclass(slots=True, kw_only=True, eq=False)
class Reservation:
    """What a bound request takes on its workers until it is released. `computing` is `decoding` for a local one."""

    request: RequestId
    computing: "Worker"
    decoding: "Worker"
    uncached_tokens: int
    prompt_tokens: int
    expected_tokens: int
    work_s: float
    """Predicted: what the prompt adds to the steps that compute it."""
    bound_at: float
    decode_cached_tokens: int = 0
    """Prompt tokens whose blocks the decode worker held already; it shares them."""
    is_prefilled: bool = False
    prefill_seen: bool = False
    decode_seen: bool = False
    is_stream: bool = False
    overtaken_s: float = 0.0
    """Predicted work of shorter prompts that were bound after it and go before it."""
    prefill_due_at: float = math.inf
    """When its prompt has to be computed, for its first token to be in time."""
    slo_itl_s: float | None = None
    stall_limit_s: float = math.inf
    """What its decode worker's `stalled_s` must not reach."""
    arrived_at: float = math.inf
    """When its decode leg reached the decode worker."""


class Worker:
    """One worker: registration, last report, own dispatches."""

    def __init__(self, registration: Registration) -> None:
        self.worker = registration.worker
        self._idle_view: WorkerView | None = None
        """How it looks to a request of which it holds nothing, while it has no prompts; None: to be found anew."""
        self.register(registration)
        self.latency = LatencyModel(registration.facts.latency, registration.facts.max_step_tokens)
        self.reported_at: float | None = None
        self._counted_at = -math.inf
        """What was there by then is in the last report."""
        self.num_running = 0
        self.num_waiting = 0
        self.waiting_prefill_tokens = 0
        self.kv_tokens = 0
        self.free_blocks = registration.facts.num_blocks
        self.plan = StepPlan()
        self.utilisation = Utilisation()
        self.has_steps = False
        """Its reports tell of engine steps. Until they do whole prefills have to teach the latency model, though each
        may have shared its steps with others; what they taught is forgotten then.
        """
        self.computing: dict[RequestId, Reservation] = {}
        self.decoding: dict[RequestId, Reservation] = {}
        self.expected_tokens = 0
        """Of all of `decoding`."""
        self._own_streams = self._to_stream = self._other_streams = 0
        self.stalled_s = 0.0
        """How long streams would have stood still here for prompts, in all its reports."""
        self._seats: list[float] = []
        """When the last one in each place of the batch would end, if no other came, in order; empty: not known …"""
        self._seats_at, self._num_seated = 0.0, 0
        """… as it was found at an instant when so many decoded."""
        self._stall_limits: list[tuple[float, int, Reservation]] = []
        """A heap: what `stalled_s` must not reach, for each stream with an SLO, and a running number."""
        self._num_limits = 0
        self._sent: deque[Reservation] = deque()
        self._arrived: deque[Reservation] = deque()
        self.unseen_prefills = self.unseen_prefill_tokens = 0
        self.unseen_decodes = self.unseen_kv_tokens = self.unseen_blocks = 0
        self.seen_tokens = self.seen_prompt_tokens = 0
        self.seen_s = 0.0
        self._others_s = 0.0

    def register(self, registration: Registration) -> None:
        """Take over a changed registration of the same epoch."""
        self._idle_view = None
        self._seats = []
        self.registration = registration
        self.role, self.facts = registration.takes or registration.role, registration.facts
        self.handover = _handover_group(registration)
        is_push = registration.handover is not None and registration.handover.mode is HandoverMode.PUSH
        self.keeps_s = _PUSH_S if is_push else math.inf
        self.state = registration.state

    @property
    def is_ready(self) -> bool:
        is_staying = self.state is WorkerState.READY and self.registration.state is WorkerState.READY
        return is_staying and self.registration.takes is not None

    @property
    def has_reservations(self) -> bool:
        return bool(self.computing or self.decoding)

    # --- reservations --------------------------------------------------------------------------------------------

    def reserve_prefill(self, reservation: Reservation, now: float) -> None:
        self._idle_view = None
        if self.facts.is_shortest_first:
            for other in self.computing.values():
                if reservation.prompt_tokens < other.uncached_tokens:
                    other.overtaken_s += reservation.work_s
        self.computing[reservation.request] = reservation
        self._sent.append(reservation)
        self.unseen_prefills += 1
        self.unseen_prefill_tokens += reservation.uncached_tokens
        due_at = reservation.prefill_due_at
        self.plan.add(reservation.uncached_tokens, reservation.work_s, now, self.pace(), due_at)

    def reserve_decode(self, reservation: Reservation, now: float) -> None:
        self._idle_view = None
        self.decoding[reservation.request] = reservation
        self.expected_tokens += reservation.expected_tokens
        self._to_stream += reservation.expected_tokens > 1
        self._limit_stalls(reservation, now)
        self.unseen_decodes += 1
        self.unseen_kv_tokens += reservation.prompt_tokens
        self.unseen_blocks += self._blocks(reservation)

    def prefilled(self, reservation: Reservation, now: float) -> None:
        """Its prompt is computed: it decodes from now on, or in a moment."""
        if reservation.expected_tokens > 1 and reservation.request in self.decoding:
            reservation.is_stream = True
            self._own_streams += 1
            self._limit_stalls(reservation, now)

    def _limit_stalls(self, reservation: Reservation, now: float) -> None:
        """From now on, stalls here are its stalls; those before it began were not."""
        if reservation.slo_itl_s is not None and reservation.expected_tokens > 1:
            step_s = self.latency.step_s(len(self.decoding), self.kv_tokens + self.unseen_kv_tokens)
            spare_s = (reservation.slo_itl_s - step_s) * (reservation.expected_tokens - 1)
            self.plan.advance(now, self.pace())
            reservation.stall_limit_s = self.stalled_s + self.plan.past_stall_s(now, step_s) + spare_s
            self._num_limits += 1
            heapq.heappush(self._stall_limits, (reservation.stall_limit_s, self._num_limits, reservation))

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
            self.seen_s = self.seen_s - reservation.work_s if self.seen_tokens else 0.0
        else:
            self.unseen_prefills -= 1
            self.unseen_prefill_tokens -= reservation.uncached_tokens
        if len(self._sent) > 2 * len(self.computing) + _SOME:
            self._sent = deque(each for each in self._sent if each.request in self.computing)
        if self.computing or self.waiting_prefill_tokens:
            self.plan.done(self.waiting_prefill_tokens + self.unseen_prefill_tokens, now, self.pace())
        else:
            self.plan.clear(now)

    def release_decode(self, reservation: Reservation, completion_tokens: int) -> None:
        if self.decoding.pop(reservation.request, None) is None:
            return
        self._idle_view = None
        self.expected_tokens -= reservation.expected_tokens
        self._own_streams -= reservation.is_stream
        self._to_stream -= reservation.expected_tokens > 1
        most = 2 * len(self.decoding) + _SOME
        if len(self._stall_limits) > most:  # those that ended lie below those that go on
            self._stall_limits = [limit for limit in self._stall_limits if self._is_limited(limit)]
            heapq.heapify(self._stall_limits)
        if len(self._arrived) > most:  # no report came to take them off
            self._arrived = deque(each for each in self._arrived if each.request in self.decoding)
        if reservation.decode_seen:
            self.num_running = max(0, self.num_running - 1)
            self.kv_tokens = max(0, self.kv_tokens - reservation.prompt_tokens - completion_tokens)
            self.free_blocks = min(self.registration.facts.num_blocks, self.free_blocks + self._blocks(reservation))
        else:
            self.unseen_decodes -= 1
            self.unseen_kv_tokens -= reservation.prompt_tokens
            self.unseen_blocks -= self._blocks(reservation)

    def _blocks(self, reservation: Reservation) -> int:
        new = reservation.prompt_tokens - reservation.decode_cached_tokens + reservation.expected_tokens
        return -(-new // self.registration.facts.block_size)

    # --- reports -------------------------------------------------------------------------------------------------

    def apply_load(self, report: LoadReport, *, now: float, report_delay_s: float) -> None:
        self._idle_view = None
        counted = self._counted_at = now - report_delay_s
        while self._sent and self._sent[0].bound_at <= counted:
            self._see_prefill(self._sent.popleft())
        while self._arrived and self._arrived[0].arrived_at <= counted:
            self._see_decode(self._arrived.popleft())
        if report.steps and not self.has_steps:
            self.has_steps = True
            self.latency = LatencyModel(self.facts.latency, self.facts.max_step_tokens)
        self.latency.learn(report.steps)
        self.state = report.state
        self.num_running, self.num_waiting = report.num_running, report.num_waiting
        self.waiting_prefill_tokens = self._not_ours_again(report.waiting_prefill_tokens)
        self.kv_tokens, self.free_blocks = report.kv_tokens, report.free_blocks
        pace = self.pace()
        self.plan.advance(now, pace)
        unseen_s = sum((sent.work_s for sent in self._sent if sent.request in self.computing), start=0.0)
        self.plan.report(
            self.waiting_prefill_tokens,
            self._reported_work_s(report),
            self.unseen_prefill_tokens,
            unseen_s,
            report.num_waiting + self.unseen_prefills,
            now,
            pace,
        )
        if report.steps:
            streams = min(report.steps[-1].batch, report.num_running)  # that step may have been the last one of some
            self._other_streams = max(0, streams - len(self.decoding))
        elif not (self.has_steps and report.num_running):
            self._other_streams = max(0, report.num_running - len(self.decoding.keys() | self.computing.keys()))
        for step in report.steps:
            if step.prefill_tokens and is_plausible(step.duration_s):
                self.stalled_s += max(0.0, step.duration_s - self.latency.step_s(step.batch, step.kv_tokens))
        self.utilisation.add(report, self.latency, now - self.reported_at if self.reported_at is not None else 0.0)
        self.reported_at = now

    def catch_up(self, reservation: Reservation) -> None:
        """Of another gateway's request that was told of late: the last report may have counted it."""
        if reservation.bound_at > self._counted_at:
            return
        self._idle_view = None
        if not reservation.is_prefilled:
            self._see_prefill(reservation)
        elif reservation.decoding is self:
            self._other_streams = max(0, self._other_streams - reservation.is_stream)
            self._see_decode(reservation)

    def _see_prefill(self, reservation: Reservation) -> None:
        if self.computing.get(reservation.request) is reservation and not reservation.prefill_seen:
            reservation.prefill_seen = True
            self.unseen_prefills -= 1
            self.unseen_prefill_tokens -= reservation.uncached_tokens
            self.seen_tokens += reservation.uncached_tokens
            self.seen_prompt_tokens += reservation.prompt_tokens
            self.seen_s += reservation.work_s

    def _see_decode(self, reservation: Reservation) -> None:
        if self.decoding.get(reservation.request) is reservation and not reservation.decode_seen:
            reservation.decode_seen = True
            self.unseen_decodes -= 1
            self.unseen_kv_tokens -= reservation.prompt_tokens
            self.unseen_blocks -= self._blocks(reservation)

    def _not_ours_again(self, tokens: int) -> int:
        """Prompt tokens of a report without those of ours that it counts though we take them for unseen."""
        surplus = tokens - max(self.seen_prompt_tokens, self.seen_tokens)
        return tokens - max(0, min(surplus, self.unseen_prefill_tokens))

    def _reported_work_s(self, report: LoadReport) -> float:
        """Work of the prompts in a report: our own part of it as predicted, the rest by the token.

        An engine that has not looked a prompt up in its cache yet reports all of it, so our part is anything between
        our uncached tokens and our prompts' tokens.
        """
        tokens = self.waiting_prefill_tokens
        own_s = self.seen_s * min(1.0, tokens / self.seen_tokens) if self.seen_tokens else 0.0
        others = tokens - max(self.seen_prompt_tokens, self.seen_tokens)
        self._others_s = 0.0
        if others > 0:
            mean = others // max(1, report.num_waiting - len(self.computing)) or 1
            self._others_s = self.latency.work_s(mean, mean) * others / mean
        return own_s + self._others_s

    # --- answers -------------------------------------------------------------------------------------------------

    @property
    def num_streams(self) -> int:
        """Sequences that decode here now."""
        return self._own_streams + self._other_streams

    def pace(self) -> Pace:
        """Of its steps at present."""
        batch = self.num_streams
        budget = self.facts.max_step_tokens - batch
        return Pace(self.latency.fixed_s(batch, self.kv_tokens + self.unseen_kv_tokens), budget if budget > 0 else 1)

    def backlog_s(self, now: float, pace: Pace | None = None) -> float:
        """Predicted seconds until a prompt sent now would begin to be computed."""
        plan = self.plan
        if plan.ends_at <= now and not (plan.ready_tokens or self.computing):
            return 0.0
        pace = pace or self.pace()
        plan.advance(now, pace)
        if plan.ends_at <= now and self.computing:  # it is late: something is left, nobody knows how much
            return _LATE_SHARE * (pace.fixed_s + max(each.work_s for each in self.computing.values()))
        return plan.starts_in_s(now, pace)

    def shared(self) -> tuple[float, int]:
        """Seconds of work, and prompts, in the step that a prompt sent now would join. `backlog_s` first."""
        if not self.plan.ready_tokens:
            return 0.0, 0
        _, work_s, num_prompts = self.plan.shared(self.pace())
        return work_s, num_prompts

    def seat_in_s(self, now: float, before: int) -> float | None:
        """Predicted seconds until a place in the batch is free for who comes now, after `before` others; 0: one is.

        No sooner than in a tenth of an answer: who should end soon may take longer, and others want the place, too.
        Other gateways' streams are taken to have begun evenly spread. None: all that decode here are another gateway's.
        """
        batch, decoding = self.facts.max_batch, self.decoding
        if len(decoding) + self._other_streams + before < batch:
            return 0.0
        if not decoding:
            return None
        step_s = self.latency.step_s(min(batch, self.num_streams), self.kv_tokens + self.unseen_kv_tokens)
        mean_s = self.expected_tokens / len(decoding) * step_s
        if not self._seats or now >= self._seats_at + _SEATS_S:
            self._find_seats(now, step_s, mean_s)
        seats = self._seats
        later = before - (batch - len(seats)) + len(decoding) - self._num_seated
        rounds, place = divmod(max(0, later), len(seats))
        return max(seats[place] - now, _LATE_SHARE * mean_s) + rounds * mean_s

    def _find_seats(self, now: float, step_s: float, mean_s: float) -> None:
        batch = self.facts.max_batch
        others = min(self._other_streams, batch)
        ends = [now + mean_s * (place + 1) / others for place in range(others)]
        for each in self.decoding.values():
            takes_s = each.expected_tokens * step_s
            begins_at = min(now, each.arrived_at)
            if len(ends) >= batch:
                begins_at = max(begins_at, heapq.heappop(ends))
            heapq.heappush(ends, max(begins_at + takes_s, now + _LATE_SHARE * takes_s))
        self._seats, self._seats_at, self._num_seated = sorted(ends), now, len(self.decoding)

    def stall_left_s(self, pace: Pace) -> float:
        """How long the streams here may stand still beyond what is to come, until one misses its SLO.

        Streams that have missed it already, and those without one, do not count.
        """
        limits = self._stall_limits
        if not limits:
            return math.inf
        step_s = self.latency.step_s(self.num_streams, self.kv_tokens + self.unseen_kv_tokens)
        coming_s = self.stalled_s + self.plan.stall_s(pace, step_s)
        while limits and (limits[0][0] < coming_s or not self._is_limited(limits[0])):
            heapq.heappop(limits)
        return limits[0][0] - coming_s if limits else math.inf

    def _is_limited(self, limit: tuple[float, int, Reservation]) -> bool:
        """Whether it is still what its stream may stand still."""
        limit_s, _, reservation = limit
        return self.decoding.get(reservation.request) is reservation and reservation.stall_limit_s == limit_s

    def passing(self, backlog_s: float) -> tuple[int, float]:
        """A prompt of fewer tokens than the first of these begins before all of ours, after the second, in seconds.

        It is compared whole with what is left of ours, as the engine does, which does not know yet what is cached.
        What is in a step stays there; other gateways' prompts may be short ones. Nobody is passed for longer than it
        takes itself.

        Returns 0 tokens where all go in turn.
        """
        if not self.facts.is_shortest_first or not self.computing:
            return 0, backlog_s
        step_s = self.latency.prefill_s(self.facts.max_step_tokens, self.facts.max_step_tokens)
        starts_in_s = step_s + self._others_s
        if self._others_s > step_s or starts_in_s >= backlog_s:
            return 0, backlog_s
        tokens = self.waiting_prefill_tokens + self.unseen_prefill_tokens
        for reservation in self.computing.values():
            tokens = min(tokens, reservation.uncached_tokens)
            if reservation.overtaken_s > reservation.work_s:
                return 0, backlog_s
        return tokens, starts_in_s

    def view(
        self, cached_tokens: int, prompt_tokens: int, num_cached: int, ahead_s: float, now: float, without_room: int = 0
    ) -> WorkerView:
        is_plain = not (cached_tokens or ahead_s or without_room)
        known = self._idle_view
        if known is not None and is_plain and known.num_cached == num_cached:
            return known
        used, plan = self.utilisation, self.plan
        backlog_s, stall_left_s, late_in_s, shared_tokens, shared_s, num_sharing = 0.0, math.inf, math.inf, 0, 0.0, 0
        # Most workers of a large fleet have no prompts at most times.
        if plan.ready_tokens or plan.ends_at > now or self.computing or self._stall_limits:
            is_plain = False
            pace = self.pace()
            backlog_s = self.backlog_s(now, pace)
            if plan.ready_tokens:
                shared_tokens, shared_s, num_sharing = plan.shared(pace)
                late_in_s = plan.late_in_s(now + backlog_s + pace.fixed_s + shared_s, num_sharing)
            if self._stall_limits:
                stall_left_s = self.stall_left_s(pace)
        passed_tokens, starts_in_s = 0, 0.0
        if self.facts.is_shortest_first:  # asked here, too: the call costs a decision among 256 workers 7 %
            passed_tokens, starts_in_s = self.passing(backlog_s)
        free_blocks = self.free_blocks - self.unseen_blocks
        is_full = len(self.decoding) + self._other_streams + without_room >= self.facts.max_batch
        is_plain = is_plain and not is_full
        view = WorkerView(
            self.worker,
            self.role,
            self.facts,
            self.latency,
            self.handover,
            cached_tokens,
            self.num_running + self.unseen_decodes,
            self.num_waiting + self.unseen_prefills,
            self.waiting_prefill_tokens + self.unseen_prefill_tokens,
            backlog_s + ahead_s,
            self.kv_tokens + self.unseen_kv_tokens,
            free_blocks if free_blocks > 0 else 0,  # noqa: FURB136 - max() takes three times as long here
            utilisation=used.computing,
            prefill_utilisation=used.prefilling,
            mean_running=used.running,
            num_passed=len(self.computing) if prompt_tokens < passed_tokens else 0,
            starts_in_s=starts_in_s,
            num_cached=num_cached,
            without_room=without_room,
            num_streams=self._to_stream + self._other_streams,
            mean_expected=self.expected_tokens / len(self.decoding) if self.decoding else 0.0,
            keeps_s=self.keeps_s,
            stall_left_s=stall_left_s,
            shared_tokens=shared_tokens,
            shared_s=shared_s,
            num_sharing=num_sharing,
            late_in_s=late_in_s,
            seat_in_s=self.seat_in_s(now, without_room) if is_full else None,
        )
        if is_plain:
            self._idle_view = view
        return view


def _handover_group(registration: Registration) -> HandoverGroup | None:
    """The one place that says who may pair: all that must agree is in the name.

    One mode, one layout, one block size, where no layout is told, and one card: its tokens are the other one's tokens.
    """
    endpoint = registration.handover
    if endpoint is None:
        return None
    parts = (endpoint.mode, registration.layout, str(registration.facts.block_size), registration.card_digest)
    return HandoverGroup(" ".join(parts))


class Utilisation:
    """How busy a worker was over about the last minute; starts as if it had been idle for ten seconds.

    A step is reported when it has ended, and may be longer than the pause between two reports: what was computed in one
    report's time may lie before the report before. It is counted when it is told, up to the time since the last steps.
    """

    def __init__(self) -> None:
        self.running = 0.0
        """Mean number of sequences that decode."""
        self._computing = self._prefilling = 0.0
        self._weight = 1 - math.exp(-10 / _WINDOW_S)
        self._unreported_s = 0.0

    @property
    def computing(self) -> float:
        """Share of the time, 0.0 to 1.0."""
        return min(1.0, self._computing)

    @property
    def prefilling(self) -> float:
        """Share of the time that went to prompts, what decoding took of their steps left out, 0.0 to 1.0."""
        return min(1.0, self._prefilling)

    def add(self, report: LoadReport, latency: LatencyModel, elapsed_s: float) -> None:
        if elapsed_s <= 0:
            return
        self._unreported_s += elapsed_s
        computing = prefilling = 0.0
        for step in report.steps:
            if is_plausible(step.duration_s):
                computing += step.duration_s
                if step.prefill_tokens:
                    decoding = latency.step_s(step.batch, step.kv_tokens) if step.batch else 0.0
                    prefilling += max(0.0, step.duration_s - decoding)
        old = math.exp(-elapsed_s / _WINDOW_S)
        weight = self._weight * old + 1 - old
        new = (1 - old) / weight
        self._weight = weight
        self._computing += new * (min(computing, self._unreported_s) / elapsed_s - self._computing)
        self._prefilling += new * (min(prefilling, self._unreported_s) / elapsed_s - self._prefilling)
        batch = min(report.steps[-1].batch if report.steps else 0, 1 << 20)
        self.running += new * (batch - self.running)
        if report.steps or not (report.num_running or report.waiting_prefill_tokens):
            self._unreported_s = 0.0
