"""One request and its answer, from arrival to the last byte: a state machine without clock, loop or socket.

A driver (`driver.py`; the simulator's is on virtual time) tells it what happens, and does what it asks for.

| state              | event                   | → state    | effects                                                  |
|--------------------|-------------------------|------------|----------------------------------------------------------|
| (new)              | start                   | ROUTING    | Submit                                                   |
| ROUTING            | Bound, one worker       | DECODING   | StartLeg(local)                                          |
| ROUTING            | Bound, pull             | PREFILLING | StartLeg(prefill)                                        |
| ROUTING            | Bound, pull, with queue | QUEUED     | EnqueuePrefill                                           |
| ROUTING            | Bound, push             | PUSHING    | StartLeg(decode), StartLeg(prefill)                      |
| ROUTING            | RouteRefused: none left | ROUTING    | Submit, with fewer workers left out                      |
| QUEUED             | QueueRefused            | PREFILLING | StartLeg(prefill)                                        |
| QUEUED, PREFILLING | LegDone with a ticket   | DECODING   | MarkPrefilled, [Head, Write], StartLeg(decode, local)    |
| QUEUED, PREFILLING | LegDone without         | ENDED      | MarkPrefilled, Finish or Reply, ReleaseReservation       |
| PUSHING            | LegDone(prefill)        | DECODING   | MarkPrefilled                                            |
| PUSHING, DECODING  | LegOutput               | (same)     | [MarkPrefilled], [Head], [Write]                         |
| PUSHING, DECODING  | LegDone(decode, local)  | ENDED      | Finish or Reply, ReleaseReservation                      |
| (a leg runs)       | LegFailed: grammar      | ENDED      | CancelLeg, ReleaseTicket, ReleaseReservation, Fail       |
| (a leg runs)       | LegFailed: too late     | ENDED      | the same: it is the deadline that has passed             |
| (a leg runs)       | LegFailed: any other    | ROUTING    | CancelLeg, ReleaseTicket, ReleaseReservation, Submit     |
| WAITING            | Joined, TimeUp          | ROUTING    | Submit                                                   |
| (any other)        | TimeUp                  | (same)     | (none): somebody had joined before                       |
| (any)              | Silence                 | (same)     | [Head]: from here on an error has no status any more     |
| (any)              | ClientGone              | ENDED      | Withdraw or CancelLeg, ReleaseTicket, ReleaseReservation |
| (any)              | Deadline, Stopping, Bug | ENDED      | the same, then Fail                                      |

What has been kept for somebody is part of the state: from the start of a prefill leg until the decode leg's first
token, whoever leaves says ReleaseTicket. But never while the decode worker may be READing: it says so itself when its
leg is cancelled, and if it was lost the lease ends by itself (ADR 15).

What the client has got is never sent again: a later leg is given `tokens`, and its worker's formatter folds them in
silence. Who is left out of the next attempt: `blame.py`.
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, ClassVar, Final

from app.serving import effects as do
from app.serving import events as on
from app.serving import summary
from app.serving.attempt import Attempt
from app.serving.blame import Pair, failure_of
from app.serving.effects import Effect, Noted
from app.serving.errors import (
    DeadlinePassed,
    EngineRefused,
    GatewayStopping,
    NotResumable,
    Retriable,
    TicketExpired,
    WorkerDisagrees,
    WorkerFailed,
)
from app.serving.events import Event, LegId
from app.serving.request import GatewayRequest
from app.serving.retries import ExchangeLimits, Retries
from planes.streams.client import WorkerLost, WorkerUnreachable
from planes.wire.errors import HeadraceError
from planes.wire.frames import DecodeLeg, Done, Leg, LocalLeg, PrefillLeg
from planes.wire.messages import HandoverMode, RequestId, WorkerId
from router.errors import DeadlineExceeded, NoPair, NoWorker
from router.request import Failure, Outcome


class State(Enum):
    """What the exchange waits for."""

    ROUTING = auto()
    """The router's answer."""
    QUEUED = auto()
    """Whichever worker takes the prompt from the prefill queue, and computes it."""
    PREFILLING = auto()
    """The prefill worker."""
    PUSHING = auto()
    """Both workers; the prefill worker WRITEs."""
    DECODING = auto()
    """The worker that decodes."""
    WAITING = auto()
    """A worker to go on with. No reservation is held."""
    ENDED = auto()


_ROUTING, _QUEUED, _PREFILLING, _PUSHING, _DECODING, _WAITING, _ENDED = State  # bound once, see CONTRIBUTING.md
_FINISHED: Final = Outcome.FINISHED

Handler = Callable[[Any, Any, float], list[Effect]]


class Exchange:
    """See the table. Read only from outside, but for `start` and `receive`."""

    __slots__ = (
        "_fallback",
        "_has_prefill_queue",
        "_has_said",
        "_kept",
        "_legs",
        "_lost",
        "_num_legs",
        "_retries",
        "_waits_for",
        "attempts",
        "code",
        "ended_at",
        "first_at",
        "is_begun",
        "request",
        "state",
        "submitted_at",
        "tokens",
    )

    def __init__(self, request: GatewayRequest, limits: ExchangeLimits, *, has_prefill_queue: bool = False) -> None:
        self.request = request
        self.state = _ROUTING
        self.tokens: list[int] = []
        """What the client has got; with n > 1 of all choices, good for counting only. A stream extends it itself."""
        self.attempts: list[Attempt] = []
        self.code = ""
        """How it ended, for metrics and log; empty until then."""
        self.submitted_at = request.arrived_at
        """Instant at which the router was asked first."""
        self.first_at: float | None = None
        """Instant of the client's first token."""
        self.ended_at: float | None = None
        self.is_begun = False
        """A streamed answer's head has been sent."""
        self._has_said = False
        """So has a part of the answer itself."""
        self._retries = Retries(limits)
        self._has_prefill_queue = has_prefill_queue
        self._legs: dict[LegId, tuple[WorkerId, Leg]] = {}
        self._num_legs = 0
        self._kept: do.ReleaseTicket | None = None
        """What must be said if the KV cache kept for this attempt will not be taken."""
        self._lost: Retriable | None = None
        """How the last leg failed."""
        self._fallback = ""
        self._waits_for: HeadraceError | None = None
        """Why no worker could be had, in the last wait."""

    @property
    def attempt(self) -> Attempt | None:
        """The last one."""
        return self.attempts[-1] if self.attempts else None

    @property
    def overhead_s(self) -> float:
        """What this gateway took itself: from the request's coming to its first route, without the router's queue."""
        begun_at = self.request.arrived_at
        if not self.attempts:
            return self.submitted_at - begun_at
        first = self.attempts[0]
        return max(0.0, first.bound_at - first.route.held_s - begun_at)

    def start(self, *, now: float) -> list[Effect]:
        """Ask for the first route."""
        self.submitted_at = now
        return [self._submit()]

    def receive(self, event: Event, *, now: float) -> list[Effect]:
        """Take one event. Those of legs that are over, and all after the end, change nothing.

        Raises:  TypeError for an event that cannot happen in this state: a bug of the driver.
        """
        leg = getattr(event, "leg", None)
        if self.state is _ENDED or (leg is not None and leg not in self._legs):
            return []
        handler = self._TRANSITIONS.get((self.state, type(event))) or self._ANY_STATE.get(type(event))
        if handler is None:
            raise TypeError(f"{type(event).__name__} in state {self.state.name} of request {self.request.request}")
        return handler(self, event, now)

    # --- routing -------------------------------------------------------------------------------------------------

    def _submit(self) -> do.Submit:
        self.state = _ROUTING
        num_tokens, excluded = len(self.tokens), self._retries.excluded
        is_retry = bool(num_tokens) or self._retries.has_failures
        return do.Submit(self.request.routable(num_tokens=num_tokens, excluded=excluded, is_retry=is_retry))

    def _bound(self, event: on.Bound, now: float) -> list[Effect]:
        route, told = event.route, list[Effect]()
        if self._retries.end_wait():
            told.append(do.Note(Noted.REPLACED))
        before = self.attempt
        was_pair = before is not None and before.route.prefill is not None
        is_fallback = was_pair and route.prefill is None and not self.tokens  # a begun answer migrates
        self._fallback = self._lost.code if is_fallback and self._lost is not None else ""
        if self._fallback:
            told.append(do.Note(Noted.FELL_BACK, self._fallback, str(self._lost)))
        self.attempts.append(Attempt(route, now, len(self.tokens)))
        if route.prefill is None:
            self.state = _DECODING
            return [*told, self._start(route.decode, LocalLeg())]
        if event.endpoint is None:
            error = WorkerUnreachable(route.prefill, "it has left, or is registered without a handover endpoint")
            return [*told, *self._failed(error, None, now)]
        if event.endpoint.mode is HandoverMode.PUSH:
            if self._has_prefill_queue:
                told.append(self._bypass("push", "a handover by push needs both legs at once"))
            self.state, self.attempts[-1].handover_at = _PUSHING, now
            taking = self._start(route.decode, DecodeLeg(source=event.endpoint))
            return [*told, taking, self._start(route.prefill, PrefillLeg(HandoverMode.PUSH))]
        kind = PrefillLeg(HandoverMode.PULL, emit_first=self.request.is_first_token_early)
        if self._has_prefill_queue and not self._retries.has_failures:
            self.state = _QUEUED
            leg = self._new_leg(route.prefill, kind)
            return [*told, do.EnqueuePrefill(leg, self._leg_name(), kind)]
        if self._has_prefill_queue:
            told.append(self._bypass("retried", "the queue cannot keep it from the workers that failed it"))
        self.state = _PREFILLING
        return [*told, self._start(route.prefill, kind)]

    def _route_refused(self, event: on.RouteRefused, now: float) -> list[Effect]:
        error = event.error
        if isinstance(error, NoWorker | NoPair) and self._retries.relax():
            return [self._submit()]
        if isinstance(error, DeadlineExceeded):
            return self._give_up(error, now)
        if self._retries.has_busy:
            return self._wait(now)
        if not self.tokens:
            # A worker that is well and cannot serve this says more than that nobody else can.
            return self._give_up(self._lost if isinstance(self._lost, WorkerFailed | WorkerDisagrees) else error, now)
        told = list[Effect]()
        self._waits_for = error
        if self._retries.begin_wait(now):
            told.append(do.Note(Noted.WAITING, error.code, str(error)))
        if self._retries.is_out_of_patience(now):
            return [*told, *self._give_up(error, now)]
        return [*told, *self._wait(now)]

    def _wait(self, now: float) -> list[Effect]:
        self.state = _WAITING
        return [do.WaitUntil(self._retries.back_off(now))]

    def _look_again(self, _: on.TimeUp, now: float) -> list[Effect]:
        if self._waits_for is not None and self._retries.is_out_of_patience(now):
            return self._give_up(self._waits_for, now)
        return [self._submit()]

    def _joined(self, event: on.Joined, _: float) -> list[Effect]:
        self._retries.forgive(event.worker)
        return [self._submit()] if self.state is _WAITING else []

    def _silence(self, _: on.Silence, __: float) -> list[Effect]:
        return self._head()

    def _too_late(self, _: on.TimeUp, __: float) -> list[Effect]:
        return []

    def _bypass(self, code: str, reason: str) -> do.Note:
        self._fallback = self._fallback or code
        return do.Note(Noted.BYPASSED, code, reason)

    # --- legs ----------------------------------------------------------------------------------------------------

    def _leg_name(self) -> RequestId:
        """The name of this attempt's legs: an engine may still be busy forgetting the attempt before."""
        number = len(self.attempts)
        return self.request.request if number == 1 else RequestId(f"{self.request.request}.{number}")

    def _new_leg(self, worker: WorkerId, kind: Leg) -> LegId:
        self._num_legs += 1
        leg = LegId(self._num_legs)
        self._legs[leg] = worker, kind
        return leg

    def _start(self, worker: WorkerId, kind: Leg) -> do.StartLeg:
        name = self._leg_name()
        if isinstance(kind, PrefillLeg):
            self._kept = do.ReleaseTicket(worker, name)
        return do.StartLeg(self._new_leg(worker, kind), worker, name, kind)

    def _queue_refused(self, event: on.QueueRefused, _: float) -> list[Effect]:
        worker, kind = self._legs.pop(event.leg)
        self.state = _PREFILLING
        return [self._bypass(event.code, event.reason), self._start(worker, kind)]

    def _leg_output(self, event: on.LegOutput, now: float) -> list[Effect]:
        _, kind = self._legs[event.leg]
        if isinstance(kind, PrefillLeg):
            return []  # whatever it has to say comes with its end
        self.tokens.extend(event.tokens)
        told = self._first_token(kind, now)
        if event.payload and self.request.format.is_streaming:
            told += self._say(event.payload)
        return told

    def _first_token(self, kind: Leg, now: float) -> list[Effect]:
        """Of a leg that decodes, or one that says it early."""
        attempt = self.attempts[-1]
        if attempt.first_at is None:
            attempt.first_at = now
        if attempt.decoding_at is None and not isinstance(kind, PrefillLeg):
            attempt.decoding_at = now
        if self.first_at is None:
            self.first_at = now
        if isinstance(kind, DecodeLeg):
            self._kept = None  # it has been taken
        return self._mark_prefilled(now) if isinstance(kind, LocalLeg) else []

    def _mark_prefilled(self, now: float) -> list[Effect]:
        attempt = self.attempts[-1]
        if attempt.prefilled_at is not None:
            return []
        attempt.prefilled_at = now
        return [do.MarkPrefilled()]

    def _say(self, payload: bytes) -> list[Effect]:
        self._has_said = True
        return [*self._head(), do.Write(payload)]

    def _head(self) -> list[Effect]:
        if self.is_begun:
            return []
        self.is_begun = True
        return [do.Head(self.headers())]

    def headers(self) -> do.Headers:
        """What the answer's head says, as things stand."""
        return summary.headers(self.request, self.attempt, self._fallback, overhead_s=self.overhead_s)

    def _prefill_done(self, event: on.LegDone, now: float) -> list[Effect]:
        """Of a prompt that was to be pulled."""
        worker, kind = self._legs.pop(event.leg)
        done, attempt = event.done, self.attempts[-1]
        if event.worker is not None:  # whichever worker took it from the queue
            worker = attempt.prefilled_by = event.worker
        attempt.prefill = done.usage
        told = self._mark_prefilled(now)
        if done.ticket is None:
            self._kept = None
            return [*told, *self._complete(done, kind, now)]
        self._kept = do.ReleaseTicket(worker, self._leg_name(), event.job)
        if done.ticket.lease_s <= 0:
            error = TicketExpired(worker, f"its lease is {done.ticket.lease_s:g} s")
            return [*told, *self._failed(error, None, now)]
        if self.request.is_first_token_early:
            self.tokens.extend(done.tokens)
            self._first_token(kind, now)
            told += self._say(done.payload) if done.payload else []
        self.state = _DECODING
        decode = attempt.route.decode
        if worker == decode:  # it took the prompt from the queue itself, and has the KV cache already
            told += self._release_ticket()
            return [*told, self._start(decode, LocalLeg())]
        attempt.handover_at = now
        return [*told, self._start(decode, DecodeLeg(ticket=done.ticket))]

    def _leg_done(self, event: on.LegDone, now: float) -> list[Effect]:
        """Of a leg beside another, or of the last one."""
        _, kind = self._legs.pop(event.leg)
        attempt = self.attempts[-1]
        if isinstance(kind, PrefillLeg):
            attempt.prefill = event.done.usage
            self.state = _DECODING
            return self._mark_prefilled(now)
        attempt.decode = event.done.usage
        return self._complete(event.done, kind, now)

    def _complete(self, done: Done, kind: Leg, now: float) -> list[Effect]:
        self.tokens.extend(done.tokens)
        told = self._first_token(kind, now)
        if self.request.format.is_streaming:
            told += [*self._head(), do.Finish(done.payload)]
        else:
            told.append(do.Reply(done.payload, self.headers()))
        self.attempts[-1].outcome = _FINISHED
        return [*told, *self._leave(now), *self._end("ok", now)]

    # --- failures ------------------------------------------------------------------------------------------------

    def _leg_failed(self, event: on.LegFailed, now: float) -> list[Effect]:
        _, kind = self._legs.pop(event.leg)
        error = event.error
        if isinstance(error, EngineRefused) and self.tokens:  # another engine has taken it
            error = WorkerDisagrees(error.worker, error.code, str(error))
        if isinstance(error, EngineRefused):
            if isinstance(kind, PrefillLeg):
                self._kept = None
            return self._abandon(error, Outcome.FAILED, now)
        pair = self._pair(kind)
        is_lost = isinstance(error, WorkerLost)
        if isinstance(kind, PrefillLeg) or (is_lost and _may_be_reading(kind)):
            self._kept = None  # its worker says so, or is gone
        if now >= self.request.deadline:  # our own timer is late, and the worker's was first
            return self._deadline(on.Deadline(), now)
        return self._failed(error, pair, now)

    def _failed(self, error: Retriable, pair: Pair | None, now: float) -> list[Effect]:
        """The attempt has failed. pair: prefill and decode worker, if their handover is what failed."""
        attempt = self.attempts[-1]
        attempt.outcome = Outcome.INTERRUPTED
        attempt.failure = Failure(error.code, error.worker, error.for_client())
        told = self._leave(now)
        self._lost = error
        if not self.request.is_resumable:
            if self._has_said:
                return [*told, *self._give_up(NotResumable(self.request.sampling.n, str(error)), now)]
            self.tokens.clear()  # it starts over
        if self._retries.failed(failure_of(error, pair=pair), num_tokens=len(self.tokens), now=now):
            return [*told, *self._give_up(error, now)]
        what = Noted.MIGRATED if self.tokens else Noted.RETRIED
        return [*told, do.Note(what, error.code, str(error)), self._submit()]

    def _pair(self, kind: Leg) -> Pair | None:
        """The two workers whose handover a leg of this kind is part of, as long as it is not complete."""
        attempt = self.attempts[-1]
        is_push = isinstance(kind, PrefillLeg) and kind.mode is HandoverMode.PUSH
        is_taking = isinstance(kind, DecodeLeg) and self._kept is not None
        return (attempt.prefill_worker, attempt.route.decode) if is_push or is_taking else None

    def _release_ticket(self) -> list[Effect]:
        kept, self._kept = self._kept, None
        return [] if kept is None else [kept]

    def _leave(self, now: float) -> list[Effect]:
        """Leave the attempt as it is now: nothing runs, is kept or reserved for it any more."""
        if any(_may_be_reading(kind) for _, kind in self._legs.values()):
            self._kept = None
        cancelled: list[Effect] = [do.CancelLeg(leg) for leg in self._legs]
        self._legs.clear()
        attempt = self.attempts[-1]
        attempt.ended_at = now
        return [*cancelled, *self._release_ticket(), do.ReleaseReservation(attempt.observed(len(self.tokens)))]

    # --- ends ----------------------------------------------------------------------------------------------------

    def _deadline(self, _: on.Deadline, now: float) -> list[Effect]:
        timeout_s = self.request.deadline - self.request.arrived_at
        return self._abandon(DeadlinePassed(timeout_s, len(self.tokens)), Outcome.FAILED, now)

    def _stopping(self, _: on.Stopping, now: float) -> list[Effect]:
        return self._abandon(GatewayStopping(), Outcome.CANCELLED, now)

    def _bug(self, event: on.Bug, now: float) -> list[Effect]:
        return self._abandon(event.error, Outcome.FAILED, now)

    def _client_gone(self, _: on.ClientGone, now: float) -> list[Effect]:
        return self._abandon(None, Outcome.CANCELLED, now)

    def _abandon(self, error: Exception | None, outcome: Outcome, now: float) -> list[Effect]:
        """End in whatever state this is. error: what the client is told; None: nobody listens."""
        told = list[Effect]()
        if self.state is _ROUTING:
            told.append(do.Withdraw())
        elif self.state is not _WAITING:
            attempt = self.attempts[-1]
            attempt.outcome = outcome
            if error is not None:
                attempt.failure = Failure(_code_of(error), None, _reason_of(error))
            told += self._leave(now)
        return [*told, *(self._end("cancelled", now) if error is None else self._give_up(error, now))]

    def _give_up(self, error: Exception, now: float) -> list[Effect]:
        return [do.Fail(error, self.headers()), *self._end(_code_of(error), now)]

    def _end(self, code: str, now: float) -> list[Effect]:
        self.state, self.code, self.ended_at = _ENDED, code, now
        return [do.Note(Noted.GAVE_UP)] if self._retries.is_waiting else []

    # --- the table in code ---------------------------------------------------------------------------------------

    _TRANSITIONS: ClassVar[dict[tuple[State, type], Handler]] = {
        (_ROUTING, on.Bound): _bound,
        (_ROUTING, on.RouteRefused): _route_refused,
        (_QUEUED, on.QueueRefused): _queue_refused,
        (_QUEUED, on.LegDone): _prefill_done,
        (_QUEUED, on.LegFailed): _leg_failed,
        (_PREFILLING, on.LegOutput): _leg_output,
        (_PREFILLING, on.LegDone): _prefill_done,
        (_PREFILLING, on.LegFailed): _leg_failed,
        (_PUSHING, on.LegOutput): _leg_output,
        (_PUSHING, on.LegDone): _leg_done,
        (_PUSHING, on.LegFailed): _leg_failed,
        (_DECODING, on.LegOutput): _leg_output,
        (_DECODING, on.LegDone): _leg_done,
        (_DECODING, on.LegFailed): _leg_failed,
        (_WAITING, on.TimeUp): _look_again,
    }
    _ANY_STATE: ClassVar[dict[type, Handler]] = {
        on.Joined: _joined,
        on.TimeUp: _too_late,
        on.Deadline: _deadline,
        on.Silence: _silence,
        on.Stopping: _stopping,
        on.Bug: _bug,
        on.ClientGone: _client_gone,
    }


def _may_be_reading(kind: Leg) -> bool:
    """Whether a leg may fetch blocks from a prefill worker's memory, which must stay as it is meanwhile."""
    return isinstance(kind, DecodeLeg) and kind.ticket is not None


def _code_of(error: Exception) -> str:
    return error.code if isinstance(error, HeadraceError) else HeadraceError.code


def _reason_of(error: Exception) -> str:
    # The text of a foreign exception may hold anything, a prompt included.
    return error.for_client() if isinstance(error, HeadraceError) else type(error).__name__
