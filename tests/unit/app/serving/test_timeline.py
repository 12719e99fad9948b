"""Where a request's time went, told from what an exchange knows at its end."""

import gc
import weakref

import pytest
from msgspec.structs import replace

from app.serving import events as on
from app.serving.exchange import Exchange
from app.serving.retries import ExchangeLimits
from app.serving.summary import summary
from app.serving.timeline import Ending
from planes.streams.client import WorkerLost
from planes.wire.frames import Done, FinishReason, StreamId, Usage
from planes.wire.messages import HandoverEndpoint, HandoverMode, WorkerId
from router.errors import NoWorker
from router.timeline import StageKind
from tests.fakes import route
from tests.unit.app.serving.test_exchange import request, ticket

P0, D0, D1 = WorkerId("p0"), WorkerId("d0"), WorkerId("d1")
PREFILL_USAGE = Usage(20, 1, 5, queue_s=0.25, prefill_s=0.5)
DECODE_USAGE = Usage(20, 8, 20, handover_s=0.125, handover_bytes=4096, decode_s=1.0)


def done(usage, tokens=(), given=None):
    return Done(StreamId(0), FinishReason.STOP, usage, b"end", list(tokens), given)


class Told:
    """An exchange, whose events come at instants of a clock that began long ago."""

    def __init__(self, **job):
        self.exchange = Exchange(request(**job), ExchangeLimits(replacement_s=5.0))
        self.exchange.start(now=0.5)
        self.leg = 0

    def at(self, now, *events):
        for event in events:
            self.exchange.receive(event, now=now)
        return self

    def bound(self, now, decode, prefill=None, mode=HandoverMode.PULL):
        endpoint = None if prefill is None else HandoverEndpoint(mode, "engine", "127.0.0.1", 5600)
        return self.at(now, on.Bound(route("r", decode, prefill), endpoint))

    def new_leg(self):
        self.leg += 1
        return on.LegId(self.leg)

    def ending(self):
        exchange = self.exchange
        ended_at = exchange.ended_at
        told = summary(
            exchange.request,
            exchange.attempt,
            code=exchange.code,
            num_tokens=len(exchange.tokens),
            first_at=exchange.first_at,
            ended_at=ended_at,
            overhead_s=exchange.overhead_s,
        )
        return Ending.of(exchange, told, ended_at=ended_at)

    def timeline(self):
        return self.ending().timeline()


def shown(told):
    return [(each.kind.value, each.attempt, each.begin_s, each.end_s, each.worker) for each in told.stages]


def handed_over(mode=HandoverMode.PULL):
    scene = Told().bound(1.0, "d0", "p0", mode)
    if mode is HandoverMode.PULL:
        scene.at(2.0, on.LegDone(scene.new_leg(), done(PREFILL_USAGE, [1], ticket(P0))))
        leg = scene.new_leg()
    else:
        leg, prefill = scene.new_leg(), scene.new_leg()
        scene.at(2.0, on.LegDone(prefill, done(PREFILL_USAGE, [], ticket(P0))))
    return scene, leg


def test_a_handed_over_request_tells_both_workers_and_what_moved():
    scene, leg = handed_over()
    told = scene.at(2.5, on.LegOutput(leg, b"x", [2])).at(4.0, on.LegDone(leg, done(DECODE_USAGE, [3]))).timeline()
    assert shown(told) == [
        ("prepare", 1, 0.0, 0.5, None),
        ("queue", 1, 0.5, 1.0, None),
        ("wait", 1, 1.0, 1.5, "p0"),
        ("prefill", 1, 1.5, 2.0, "p0"),
        ("handover", 1, 2.0, 2.125, "d0"),
        ("decode", 1, 2.125, 4.0, "d0"),
    ]
    prefill, handover, decode = told.stages[3:]
    assert (prefill.tokens, prefill.cached_tokens) == (15, 5)
    assert (handover.source, handover.num_bytes) == ("p0", 4096)
    assert decode.tokens == 3
    assert (told.prefill, told.decode, told.policy, told.code, told.end_s) == ("p0", "d0", "fake", "ok", 4.0)
    assert (told.ttft_s, told.completion_tokens, told.interruptions) == (2.0, 3, ())


def test_a_handover_by_push_ends_where_its_taker_says():
    scene, leg = handed_over(HandoverMode.PUSH)
    usage = Usage(20, 8, 20, handover_s=1.25, handover_bytes=1)  # since the decode leg came, with the prefill
    told = scene.at(2.5, on.LegOutput(leg, b"x", [2])).at(4.0, on.LegDone(leg, done(usage))).timeline()
    assert shown(told)[3:] == [
        ("prefill", 1, 1.5, 2.0, "p0"),
        ("handover", 1, 2.0, 2.25, "d0"),
        ("decode", 1, 2.25, 4.0, "d0"),
    ]


def test_a_local_leg_prefills_until_its_first_token():
    scene = Told().bound(1.0, "d0")
    leg = scene.new_leg()
    scene.at(2.0, on.LegOutput(leg, b"x", [1]))
    told = scene.at(3.0, on.LegDone(leg, done(PREFILL_USAGE, [2]))).timeline()
    assert shown(told)[2:] == [
        ("wait", 1, 1.0, 1.5, "d0"),
        ("prefill", 1, 1.5, 2.0, "d0"),
        ("decode", 1, 2.0, 3.0, "d0"),
    ]


def test_a_prefill_longer_than_its_leg_does_not_begin_before_it():
    scene = Told().bound(1.0, "d0")
    told = scene.at(1.25, on.LegDone(scene.new_leg(), done(PREFILL_USAGE, [2]))).timeline()
    assert shown(told)[2:4] == [("wait", 1, 1.0, 1.0, "d0"), ("prefill", 1, 1.0, 1.25, "d0")]


def test_a_migrated_stream_tells_both_attempts_and_who_failed():
    scene = Told().bound(1.0, "d0")
    leg = scene.new_leg()
    scene.at(2.0, on.LegOutput(leg, b"x", [1, 2, 3])).at(3.0, on.LegFailed(leg, WorkerLost(D0, "killed")))
    scene.bound(4.0, "d1")
    leg = scene.new_leg()
    told = scene.at(5.0, on.LegOutput(leg, b"y", [4])).at(6.0, on.LegDone(leg, done(PREFILL_USAGE, [5]))).timeline()
    assert shown(told)[2:] == [
        ("prefill", 1, 1.0, 2.0, "d0"),  # nobody has said how long it waited
        ("decode", 1, 2.0, 3.0, "d0"),
        ("queue", 2, 3.0, 4.0, None),
        ("wait", 2, 4.0, 4.5, "d1"),
        ("prefill", 2, 4.5, 5.0, "d1"),
        ("decode", 2, 5.0, 6.0, "d1"),
    ]
    assert [each.tokens for each in told.stages if each.kind is StageKind.DECODE] == [3, 2]
    (failed,) = told.interruptions
    assert (failed.attempt, failed.at_s, failed.code, failed.worker, failed.is_migration) == (
        1,
        3.0,
        "worker_lost",
        "d0",
        True,
    )


def test_a_decode_worker_lost_while_it_takes_the_cache_has_decoded_nothing():
    scene, leg = handed_over()
    told = scene.at(2.5, on.LegFailed(leg, WorkerLost(D0, "killed"))).at(3.0, on.ClientGone()).timeline()
    assert shown(told)[3:] == [
        ("prefill", 1, 1.5, 2.0, "p0"),
        ("handover", 1, 2.0, 2.5, "d0"),
        ("queue", 2, 2.5, 3.0, None),
    ]
    assert told.code == "cancelled"


def test_a_refused_request_has_only_waited():
    told = Told().at(0.75, on.RouteRefused(NoWorker("sim", num_workers=0))).timeline()
    assert shown(told) == [("prepare", 1, 0.0, 0.5, None), ("queue", 1, 0.5, 0.75, None)]
    assert (told.code, told.prefill, told.decode) == ("no_worker", None, None)


@pytest.mark.parametrize("max_attempts", [3, 12])
def test_of_many_attempts_the_last_eight_are_told(max_attempts):
    scene = Told()
    scene.exchange = Exchange(request(), ExchangeLimits(max_attempts=max_attempts))
    scene.exchange.start(now=0.5)
    for number in range(max_attempts):
        scene.bound(1.0 + number, "d0").at(1.5 + number, on.LegFailed(scene.new_leg(), WorkerLost(D0, "killed")))
    told = scene.timeline()
    first = max(1, max_attempts - 7)
    assert [each.attempt for each in told.interruptions] == list(range(first, max_attempts + 1))
    queued = [each for each in told.stages if each.kind is StageKind.QUEUE]
    assert [each.attempt for each in queued] == list(range(first, max_attempts + 1))
    assert {each.end_s - each.begin_s for each in queued} == {0.5}
    assert told.end_s == queued[-1].end_s + 0.5


def test_what_the_gateway_took_itself_has_neither_the_queue_nor_workers_in_it():
    scene = Told().at(4.0, on.Bound(replace(route("r", "d0"), held_s=3.0), None))
    leg = scene.new_leg()
    scene.at(9.0, on.LegFailed(leg, WorkerLost(D0, "killed"))).bound(15.0, "d1")
    assert scene.exchange.overhead_s == 1.0
    assert dict(scene.exchange.headers())["x-headrace-overhead-ms"] == "1000.000"
    told = scene.at(20.0, on.LegDone(scene.new_leg(), done(PREFILL_USAGE, [2]))).timeline()
    assert (told.overhead_s, told.end_s) == (1.0, 20.0)


def test_a_request_without_a_route_was_prepared_all_the_same():
    scene = Told().at(7.0, on.RouteRefused(NoWorker("sim", num_workers=0)))
    assert dict(scene.exchange.headers())["x-headrace-overhead-ms"] == "500.000"


def test_what_is_kept_for_a_timeline_keeps_no_prompt():
    scene, leg = handed_over()
    scene.at(4.0, on.LegDone(leg, done(DECODE_USAGE, [3])))
    ending, prompt = scene.ending(), weakref.ref(scene.exchange.request.prompt)
    assert prompt() is not None
    del scene
    gc.collect()
    assert prompt() is None
    assert ending.timeline().prompt_tokens > 0
