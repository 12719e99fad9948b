"""The exchange as a machine: every event in any order, against a small model of what is owed."""

from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.serving import effects as do
from app.serving import events as on
from app.serving.errors import (
    DeadlinePassed,
    RoleChanged,
    TicketExpired,
    WorkerBusy,
    WorkerDisagrees,
    WorkerFailed,
    WorkerRefused,
)
from app.serving.exchange import Exchange, State
from app.serving.request import GatewayRequest
from app.serving.retries import ExchangeLimits
from planes.streams.client import WorkerLost, WorkerUnreachable
from planes.wire.errors import Expired
from planes.wire.frames import (
    DecodeLeg,
    Done,
    FinishReason,
    Format,
    LocalLeg,
    PrefillLeg,
    Sampling,
    StreamId,
    Ticket,
    Usage,
)
from planes.wire.messages import HandoverEndpoint, HandoverMode, RequestId, WorkerId
from router.errors import DeadlineExceeded, NoPair, NoWorker, QueueFull
from router.request import Outcome
from tests.fakes import route

PREFILL = [WorkerId("p0"), WorkerId("p1")]
DECODE = [WorkerId("d0"), WorkerId("d1")]
USAGE = Usage(20, 3, 16)
NUM_TOKENS = 8


def answer_bytes(num_tokens):
    """What the client has after so many tokens; the formatter holds text back at every third."""
    return b"".join(b"<%d>" % number for number in range(num_tokens - (num_tokens % 3 == 2)))


WHOLE = b"".join(b"<%d>" % number for number in range(NUM_TOKENS))


def request(*, is_streaming=True, prompt_tokens=20, **sampling):
    return GatewayRequest(
        request=RequestId("r"),
        model="sim",
        prompt=np.arange(1, prompt_tokens + 1, dtype=np.uint32),
        blocks=np.empty(0, np.uint64),
        block_size=16,
        sampling=Sampling(**{"max_tokens": NUM_TOKENS, "temperature": 0.0, **sampling}),
        format=Format("chat", "id", "sim", 0, is_streaming=is_streaming),
        arrived_at=0.0,
        deadline=1000.0,
    )


def ticket(worker, lease_s=30.0):
    return Ticket(worker, HandoverMode.PULL, 20, lease_s, b"")


def done(payload=b"", tokens=(), given=None):
    return Done(StreamId(0), FinishReason.STOP, USAGE, payload, list(tokens), given)


ENDPOINTS = {mode: HandoverEndpoint(mode, "engine", "127.0.0.1", 5600) for mode in HandoverMode}


@dataclass
class Owed:
    """What the driver would hold for the exchange: all of it must be given back."""

    is_submitted: bool = False
    is_bound: bool = False
    num_bound: int = 0
    num_released: int = 0
    legs: dict = field(default_factory=dict)
    """By id: StartLeg or EnqueuePrefill."""
    kept: set = field(default_factory=set)
    """(worker, name of the leg) of KV caches that a prefill worker keeps, or may keep."""
    queued: dict = field(default_factory=dict)
    """The same of prompts in the queue: name of the job → worker that took it."""
    written: bytes = b""
    ends: list = field(default_factory=list)
    is_head_out: bool = False
    wakes_at: float | None = None


class EveryOrder(RuleBasedStateMachine):
    """Draws events in any order; after each, what is owed must add up."""

    @initialize(
        is_streaming=st.booleans(),
        sampling=st.sampled_from([{}, {"seed": 1, "temperature": 1.0}, {"n": 2, "temperature": 1.0}, {"logprobs": 1}]),
        prompt_tokens=st.sampled_from([16, 20]),
        has_queue=st.booleans(),
        max_attempts=st.integers(1, 4),
        replacement_s=st.sampled_from([0.0, 5.0, 60.0]),
    )
    def begin(self, is_streaming, sampling, prompt_tokens, has_queue, max_attempts, replacement_s):
        self.request = request(is_streaming=is_streaming, prompt_tokens=prompt_tokens, **sampling)
        limits = ExchangeLimits(max_attempts, replacement_s)
        self.exchange = Exchange(self.request, limits, has_prefill_queue=has_queue)
        self.now = 0.0
        self.owed = Owed()
        self.old_legs = [on.LegId(99)]
        self.excluded = frozenset()
        self.perform(self.exchange.start(now=self.now))

    # --- the driver ----------------------------------------------------------------------------------------------

    def tell(self, event):
        was_ended = self.exchange.state is State.ENDED
        told = self.exchange.receive(event, now=self.now)
        assert not (was_ended and told), "nothing after the end"
        self.perform(told)

    def perform(self, effects):  # noqa: C901, PLR0912 - one case an effect
        owed = self.owed
        for effect in effects:
            match effect:
                case do.Submit():
                    assert not owed.is_submitted
                    assert not owed.is_bound
                    owed.is_submitted, self.excluded = True, effect.request.excluded
                case do.Withdraw():
                    assert owed.is_submitted
                    owed.is_submitted = False
                case do.MarkPrefilled():
                    assert owed.is_bound
                case do.ReleaseReservation():
                    assert owed.is_bound
                    owed.is_bound = False
                    owed.num_released += 1
                case do.StartLeg():
                    assert owed.is_bound
                    assert self.request.is_resumable or not self.exchange.tokens, "it starts over"
                    owed.legs[effect.leg] = effect
                    if isinstance(effect.kind, PrefillLeg):
                        owed.kept.add((effect.worker, effect.name))
                case do.EnqueuePrefill():
                    assert owed.is_bound
                    owed.legs[effect.leg] = effect
                case do.CancelLeg():
                    self.old_legs.append(effect.leg)
                    if is_reading(owed.legs.pop(effect.leg)):
                        self.taken()  # or not: its worker tells the other one
                case do.ReleaseTicket():
                    if effect.job is None:
                        owed.kept.remove((effect.worker, effect.name))
                    else:
                        assert owed.queued.pop(effect.job) == effect.worker
                case do.Head():
                    assert self.request.format.is_streaming
                    assert not owed.is_head_out
                    assert not owed.ends
                    owed.is_head_out = True
                case do.Write():
                    assert owed.is_head_out
                    assert effect.payload
                    assert not owed.ends
                    owed.written += effect.payload
                case do.Finish():
                    assert owed.is_head_out
                    owed.written += effect.payload
                    owed.ends.append("whole")
                case do.Reply():
                    assert not owed.is_head_out
                    owed.written += effect.payload
                    owed.ends.append("whole")
                case do.Fail():
                    assert effect.headers
                    owed.ends.append("failed")
                case do.WaitUntil():
                    assert effect.instant >= self.now
                    owed.wakes_at = effect.instant
                case do.Note():
                    pass
                case _:
                    pytest.fail(f"an effect that no driver knows: {effect}")

    def legs(self, *kinds):
        return [leg for leg in self.owed.legs.values() if isinstance(leg.kind, kinds)]

    @property
    def has_legs(self):
        return bool(self.owed.legs)

    # --- the router ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.owed.is_submitted)
    @rule(
        prefill=st.sampled_from([None, *PREFILL]),
        decode=st.sampled_from(DECODE),
        mode=st.sampled_from([HandoverMode.PULL, HandoverMode.PUSH, None]),
    )
    def bound(self, prefill, decode, mode):
        prefill = None if prefill in self.excluded or self.exchange.tokens else prefill
        if decode in self.excluded:
            (decode, *_) = [worker for worker in DECODE if worker not in self.excluded] or [None]
        if decode is None:
            self.refused(NoWorker("sim", num_workers=1))
            return
        self.owed.is_submitted, self.owed.is_bound = False, True
        self.owed.num_bound += 1
        self.tell(on.Bound(route("r", decode, prefill), ENDPOINTS.get(mode) if prefill else None))

    @precondition(lambda self: self.owed.is_submitted)
    @rule(
        error=st.sampled_from(
            [
                NoWorker("sim", num_workers=1),
                NoPair("sim", num_workers=1),
                QueueFull(5, 5, retry_after_s=1.0),
                DeadlineExceeded(1.0),
            ]
        )
    )
    def refused(self, error):
        self.owed.is_submitted = False
        self.tell(on.RouteRefused(error))

    # --- workers -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.legs(LocalLeg, DecodeLeg))
    @rule(num=st.integers(1, 3))
    def a_decoding_leg_speaks(self, num):
        leg = self.legs(LocalLeg, DecodeLeg)[0]
        before = len(self.exchange.tokens)
        after = min(before + num, NUM_TOKENS - 1)
        if after == before:
            return
        payload = answer_bytes(after)[len(answer_bytes(before)) :] if self.request.format.is_streaming else b""
        self.tell(on.LegOutput(leg.leg, payload, list(range(before, after))))
        if isinstance(leg.kind, DecodeLeg):
            self.taken()

    def taken(self):
        """The decode worker has the KV cache: nothing is kept for it any more."""
        self.owed.kept.clear()
        self.owed.queued.clear()

    @precondition(lambda self: self.legs(LocalLeg, DecodeLeg))
    @rule()
    def a_decoding_leg_ends(self):
        leg = self.legs(LocalLeg, DecodeLeg)[0]
        del self.owed.legs[leg.leg]
        if isinstance(leg.kind, DecodeLeg):
            self.taken()
        before = len(self.exchange.tokens)
        is_streaming = self.request.format.is_streaming
        rest = WHOLE[len(answer_bytes(before)) :] if is_streaming else WHOLE
        self.tell(on.LegDone(leg.leg, done(rest, range(before, NUM_TOKENS))))

    @precondition(lambda self: self.legs(PrefillLeg))
    @rule(
        lease_s=st.sampled_from([30.0, 0.0]),
        is_last=st.booleans(),
        taker=st.sampled_from([*PREFILL, *DECODE]),
    )
    def a_prefill_leg_ends(self, lease_s, is_last, taker):
        leg = self.legs(PrefillLeg)[0]
        del self.owed.legs[leg.leg]
        is_queued = isinstance(leg, do.EnqueuePrefill)
        worker = taker if is_queued else leg.worker
        is_push = leg.kind.mode is HandoverMode.PUSH
        if is_last and not is_push:
            self.owed.kept.discard((worker, leg.name))
            payload = WHOLE
            given = done(payload, range(NUM_TOKENS))
        else:
            is_early = leg.kind.emit_first and self.request.is_first_token_early
            payload, tokens = (answer_bytes(1), [0]) if is_early else (b"", [])
            given = done(payload, tokens, ticket(worker, lease_s))
            if is_queued:
                self.owed.queued[f"{leg.name}.q"] = worker
        if is_queued:
            self.tell(on.LegDone(leg.leg, given, worker, RequestId(f"{leg.name}.q")))
        else:
            self.tell(on.LegDone(leg.leg, given))

    @precondition(lambda self: self.has_legs)
    @rule(
        data=st.data(),
        error=st.sampled_from(["lost", "unreachable", "refused", "busy", "role", "failed", "disagrees", "expired"]),
    )
    def a_leg_fails(self, data, error):
        leg = data.draw(st.sampled_from(list(self.owed.legs.values())))
        del self.owed.legs[leg.leg]
        worker = PREFILL[0] if isinstance(leg, do.EnqueuePrefill) else leg.worker
        if isinstance(leg.kind, PrefillLeg):
            self.owed.kept.discard((worker, leg.name))  # its worker says so, or is gone with all that it kept
        if error == "lost" and is_reading(leg):
            self.taken()  # it may be reading still: the lease ends by itself
        self.tell(on.LegFailed(leg.leg, failure(error, worker)))

    @precondition(lambda self: any(isinstance(leg, do.EnqueuePrefill) for leg in self.owed.legs.values()))
    @rule()
    def the_queue_cannot_take_it(self):
        leg = next(leg for leg in self.owed.legs.values() if isinstance(leg, do.EnqueuePrefill))
        del self.owed.legs[leg.leg]
        self.tell(on.QueueRefused(leg.leg, "prefill_queue_full", "full"))

    @precondition(lambda self: self.legs(PrefillLeg))
    @rule()
    def a_prefill_leg_speaks_out_of_turn(self):
        leg = self.legs(PrefillLeg)[0]
        if isinstance(leg, do.StartLeg):
            self.tell(on.LegOutput(leg.leg, b"out of turn", [666]))

    # --- everything else -----------------------------------------------------------------------------------------

    @rule(data=st.data())
    def news_of_a_leg_that_is_over_changes_nothing(self, data):
        leg = data.draw(st.sampled_from(self.old_legs))
        for event in (
            on.LegOutput(leg, b"late", [1]),
            on.LegDone(leg, done(b"late", [1])),
            on.LegFailed(leg, failure("lost", DECODE[0])),
        ):
            assert self.exchange.receive(event, now=self.now) == []

    @rule(worker=st.sampled_from([*PREFILL, *DECODE]))
    def a_worker_joins(self, worker):
        self.tell(on.Joined(worker))

    @precondition(lambda self: self.owed.wakes_at is not None and self.exchange.state is State.WAITING)
    @rule(late_s=st.sampled_from([0.0, 0.01, 100.0]))
    def time_is_up(self, late_s):
        self.now = self.owed.wakes_at + late_s
        self.owed.wakes_at = None
        self.tell(on.TimeUp())

    @precondition(lambda self: self.exchange.state is not State.ENDED)
    @rule(how=st.sampled_from(["deadline", "gone", "stopping", "bug", "later"]), is_rare=st.integers(0, 4))
    def it_ends(self, how, is_rare):
        if is_rare:
            return
        events = {"deadline": on.Deadline(), "gone": on.ClientGone(), "stopping": on.Stopping()}
        if how == "gone":
            self.owed.ends.append("gone")
        self.tell(events.get(how) or on.Bug(ZeroDivisionError()))

    # --- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def the_client_has_a_prefix_of_the_answer(self):
        if self.request.format.is_streaming:
            assert WHOLE.startswith(self.owed.written)
        if self.owed.ends == ["whole"]:
            assert self.owed.written == WHOLE
            assert self.exchange.tokens == list(range(NUM_TOKENS))

    @invariant()
    def there_is_one_end_and_then_nothing_is_owed(self):
        assert len(self.owed.ends) <= 1
        assert bool(self.owed.ends) == (self.exchange.state is State.ENDED) == bool(self.exchange.code)
        if self.owed.ends:
            assert not self.owed.legs
            assert not self.owed.is_submitted
            assert not self.owed.is_bound
            assert not self.owed.kept, "a KV cache that nobody will take"
            assert not self.owed.queued

    @invariant()
    def reserve_and_release_balance(self):
        assert self.owed.num_bound == self.owed.num_released + self.owed.is_bound
        assert not (self.owed.is_bound and self.exchange.state in (State.ROUTING, State.WAITING))

    @invariant()
    def it_always_waits_for_somebody(self):
        state = self.exchange.state
        assert self.owed.is_submitted == (state is State.ROUTING)
        assert bool(self.owed.legs) == (state in (State.QUEUED, State.PREFILLING, State.PUSHING, State.DECODING))
        if state is State.WAITING:
            assert self.owed.wakes_at is not None


EveryOrder.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestEveryOrder = EveryOrder.TestCase


def is_reading(leg):
    return isinstance(leg.kind, DecodeLeg) and leg.kind.ticket is not None


def failure(error, worker):
    return {
        "lost": WorkerLost(worker, "killed"),
        "unreachable": WorkerUnreachable(worker, "gone"),
        "refused": WorkerRefused(worker, "worker_draining", "it leaves"),
        "busy": WorkerBusy(worker, "8 requests run"),
        "role": RoleChanged(worker, "it only prefills"),
        "failed": WorkerFailed(worker, "engine_error", "broken"),
        "disagrees": WorkerDisagrees(worker, "invalid_request", "odd"),
        "expired": TicketExpired(worker, "late"),
    }[error]


@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize(
    ("event", "outcome", "failure", "code"),
    [
        (on.Deadline(), Outcome.FAILED, ("deadline", None), "deadline"),
        (on.Stopping(), Outcome.CANCELLED, ("gateway_stopping", None), "gateway_stopping"),
        (on.Bug(ZeroDivisionError("my pin is 4711")), Outcome.FAILED, ("internal_error", None), "internal_error"),
        (on.ClientGone(), Outcome.CANCELLED, None, "cancelled"),
    ],
)
def test_an_attempt_that_is_left_is_recorded_as_what_ended_it(event, outcome, failure, code, is_begun):
    exchange = Exchange(request(), ExchangeLimits())
    exchange.start(now=0.0)
    (started,) = exchange.receive(on.Bound(route("r", "d0"), None), now=0.0)
    if is_begun:
        exchange.receive(on.LegOutput(started.leg, b"<0>", [0]), now=1.0)
    (released,) = [each for each in exchange.receive(event, now=2.0) if isinstance(each, do.ReleaseReservation)]
    told = released.observed.failure
    assert (released.observed.outcome, told and (told.code, told.worker), exchange.code) == (outcome, failure, code)
    assert told is None or "4711" not in told.reason


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_begun_answer_that_goes_on_alone_has_migrated_and_not_fallen_back(num_tokens):
    exchange = Exchange(request(), ExchangeLimits())
    exchange.start(now=0.0)
    (prefilling,) = exchange.receive(on.Bound(route("r", "d0", "p0"), ENDPOINTS[HandoverMode.PULL]), now=0.0)
    told = exchange.receive(on.LegDone(prefilling.leg, done(given=ticket(PREFILL[0]))), now=1.0)
    (decoding,) = [each for each in told if isinstance(each, do.StartLeg)]
    if num_tokens:
        exchange.receive(on.LegOutput(decoding.leg, b"<0>", [0]), now=1.0)
    lost = exchange.receive(on.LegFailed(decoding.leg, WorkerLost(DECODE[0], "killed")), now=2.0)
    told = [*lost, *exchange.receive(on.Bound(route("r", "d1"), None), now=2.0)]
    noted = [(each.what, each.code, bool(each.reason)) for each in told if isinstance(each, do.Note)]
    expected = [do.Noted.MIGRATED] if num_tokens else [do.Noted.RETRIED, do.Noted.FELL_BACK]
    assert noted == [(what, "worker_lost", True) for what in expected]


def expired(worker):
    return WorkerFailed(WorkerId(worker), "deadline_exceeded", "not finished 0.05 s after it arrived here")


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_leg_that_fails_once_the_deadline_has_passed_is_told_as_the_deadline(num_tokens):
    """A worker's timer may be first by a moment: the client hears what it would have heard from ours."""
    exchange = Exchange(request(), ExchangeLimits())
    exchange.start(now=0.0)
    (started,) = exchange.receive(on.Bound(route("r", "d0"), None), now=0.0)
    if num_tokens:
        exchange.receive(on.LegOutput(started.leg, b"<0>", [0]), now=1.0)
    told = exchange.receive(on.LegFailed(started.leg, expired("d0")), now=1000.0)
    (failed,) = [each for each in told if isinstance(each, do.Fail)]
    assert isinstance(failed.error, DeadlinePassed)
    assert (failed.error.code, exchange.code, exchange.state) == ("deadline", "deadline", State.ENDED)
    assert sum(isinstance(each, do.ReleaseReservation) for each in told) == 1
    assert not any(isinstance(each, do.Submit) for each in told)


def test_a_queue_that_is_out_of_time_says_so_though_a_worker_failed_before():
    exchange = Exchange(request(), ExchangeLimits())
    exchange.start(now=0.0)
    (started,) = exchange.receive(on.Bound(route("r", "d0"), None), now=0.0)
    exchange.receive(on.LegFailed(started.leg, expired("d0")), now=999.999)
    (failed,) = exchange.receive(on.RouteRefused(DeadlineExceeded(0.0)), now=1000.0)
    assert failed.error.code == "deadline"
    assert isinstance(failed.error, Expired)


@pytest.mark.parametrize("error", [WorkerFailed, WorkerRefused, WorkerDisagrees])
def test_what_is_recorded_of_a_failed_leg_has_no_words_of_the_worker(error):
    exchange = Exchange(request(), ExchangeLimits())
    exchange.start(now=0.0)
    (started,) = exchange.receive(on.Bound(route("r", "d0"), None), now=0.0)
    failed = on.LegFailed(started.leg, error(WorkerId("d0"), "engine_error", "my pin is 4711"))
    (released,) = [each for each in exchange.receive(failed, now=1.0) if isinstance(each, do.ReleaseReservation)]
    told = released.observed.failure
    assert (told.worker, "4711" in told.reason, "engine_error" in told.reason) == ("d0", False, True)
