"""Each leg, failing in each way, at each moment, in each mode of handover: through the real driver and router."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from app.metrics import Metrics
from app.openai.request_headers import HeaderOptions
from app.serving.binding import Dispatcher
from app.serving.errors import leg_error
from app.serving.prefill_queue import Prefilled
from app.serving.relay import Relay
from app.serving.request import GatewayRequest
from app.serving.retries import ExchangeLimits
from planes.streams.client import WorkerLost, WorkerUnreachable
from planes.wire.frames import (
    DecodeLeg,
    Done,
    Failed,
    FailureKind,
    FinishReason,
    Format,
    LocalLeg,
    PrefillLeg,
    Sampling,
    StreamId,
    Ticket,
    Usage,
    unpack_tokens,
)
from planes.wire.messages import HandoverMode, LoadReport, RequestId, Role, WorkerId, WorkerState
from router.policies import load_policy
from router.request import HandoverPreference, Outcome
from router.router import Router
from router.settings import RouterSettings
from tests.fakes import FakeResponse, registration

NUM_TOKENS = 6
WHOLE = b"".join(b"<%d>" % number for number in range(NUM_TOKENS))
USAGE = Usage(20, NUM_TOKENS, 0)
LEGS = {"local": LocalLeg, "prefill": PrefillLeg, "decode": DecodeLeg}


@dataclass
class Fault:
    """leg, at: which leg fails and after how many of its tokens.  how: as in `World.fail`.  left: how often."""

    leg: str
    how: str
    at: int = 0
    left: int = 1
    worker: str | None = None
    """Only this one's; None: whichever comes first."""

    def hits(self, worker, request):
        is_hit = self.left > 0 and isinstance(request.leg, LEGS[self.leg]) and self.worker in (None, worker)
        self.left -= is_hit
        return is_hit


@dataclass
class World:
    """Workers that compute `WHOLE`, a step each turn of the event loop, and keep count of what they keep."""

    mode: HandoverMode
    fault: Fault
    kept: set = field(default_factory=set)
    """(worker, name of the leg) of KV caches that wait to be taken."""
    written: set = field(default_factory=set)
    """The same of those that had been pushed when their worker was lost."""
    running: dict = field(default_factory=dict)
    legs: list = field(default_factory=list)
    """(worker, kind) of all legs that were started."""
    connections: dict = field(default_factory=dict)
    registrations: dict = field(default_factory=dict)
    watchers: list = field(default_factory=list)
    on_lost: Callable[[WorkerId], None] = lambda _: None

    def connection(self, worker):
        if worker not in self.connections:
            raise WorkerUnreachable(worker, "its stream was lost")
        return self.connections[worker]

    def registration(self, worker):
        if worker not in self.registrations:
            raise WorkerUnreachable(worker, "it is not registered any more")
        return self.registrations[worker]

    def watch_joins(self, on_joined):
        self.watchers.append(on_joined)
        return lambda: self.watchers.remove(on_joined)

    def fail(self, worker, request, sink):
        """Let a leg end badly; `silent`: not at all."""
        failed = {
            "refused": Failed(StreamId(0), FailureKind.REJECTED, "worker_draining", "it leaves"),
            "busy": Failed(StreamId(0), FailureKind.REJECTED, "worker_busy", "8 requests run"),
            "other role": Failed(StreamId(0), FailureKind.REJECTED, "role_changed", "it only prefills"),
            "moved": Failed(StreamId(0), FailureKind.INTERRUPTED, "role_changed", "it shall only prefill"),
            "failed": Failed(StreamId(0), FailureKind.INTERRUPTED, "engine_error", "broken"),
            "invalid": Failed(StreamId(0), FailureKind.INVALID, "invalid_request", "odd"),
            "expired": Failed(StreamId(0), FailureKind.INTERRUPTED, "ticket_expired", "31 s old"),
        }.get(self.fault.how)
        if self.fault.how == "lost":
            self.lose(worker, sink)
        elif failed is not None:
            sink.on_failed(failed)

    def lose(self, worker, sink):
        self.kept -= {each for each in self.kept if each[0] == worker}
        self.on_lost(worker)
        del self.connections[worker], self.registrations[worker]
        sink.on_lost(WorkerLost(worker, "killed"))

    def drop(self, name):
        self.kept -= {each for each in self.kept if each[1] == name}

    async def run(self, worker, request, sink):
        is_hit = self.fault.hits(worker, request)
        await asyncio.sleep(0)
        if isinstance(request.leg, PrefillLeg):
            await self.prefill(worker, request, sink, is_hit=is_hit)
        else:
            await self.decode(worker, request, sink, is_hit=is_hit)

    async def prefill(self, worker, request, sink, *, is_hit):
        if is_hit and self.fault.at == 0 and self.fault.how != "expired":
            self.fail(worker, request, sink)
            return
        self.kept.add((worker, request.request))
        lease_s = 0.0 if is_hit and self.fault.how == "expired" else 30.0
        ticket = Ticket(worker, self.mode, 20, lease_s, request.request.encode())
        payload, tokens = (b"<0>", [0]) if request.leg.emit_first else (b"", [])
        sink.on_done(Done(StreamId(0), FinishReason.LENGTH, USAGE, payload, tokens, ticket))
        if is_hit and self.fault.at > 0 and self.fault.how == "lost":  # after it has answered
            if self.mode is HandoverMode.PUSH:
                self.written.add((worker, request.request))
            self.kept.discard((worker, request.request))
            self.on_lost(worker)
            del self.connections[worker], self.registrations[worker]

    async def decode(self, worker, request, sink, *, is_hit):
        leg, at = request.leg, len(unpack_tokens(request.resume))
        if isinstance(leg, DecodeLeg):
            name = request.request if leg.ticket is None else RequestId(leg.ticket.params.decode())
            if is_hit and self.fault.at == 0:
                if self.fault.how == "lost":
                    self.drop(name)  # it may be reading still: the lease ends by itself
                self.fail(worker, request, sink)
                return
            if leg.ticket is not None and leg.ticket.worker not in self.connections:
                sink.on_failed(
                    Failed(StreamId(0), FailureKind.INTERRUPTED, "engine_error", "nobody there to READ from")
                )
                return
            while not any(each[1] == name for each in (*self.kept, *self.written)):  # noqa: ASYNC110 - pushed to
                await asyncio.sleep(0.001)
            self.drop(name)
        for number, token in enumerate(range(at, NUM_TOKENS - 1)):
            if is_hit and number == self.fault.at:
                self.fail(worker, request, sink)
                return
            sink.on_delta(b"<%d>" % token, [token])
            await asyncio.sleep(0)
        sink.on_done(Done(StreamId(0), FinishReason.STOP, USAGE, b"<%d>" % (NUM_TOKENS - 1), [NUM_TOKENS - 1]))


class Connection:
    """A worker of the world, and its stream."""

    def __init__(self, world, worker):
        self.world, self.worker = world, WorkerId(worker)
        self._streams = itertools.count()
        self.requests = {}

    def start(self, request, sink):
        stream = next(self._streams)
        self.world.legs.append((self.worker, type(request.leg)))
        task = asyncio.create_task(self.world.run(self.worker, request, sink))
        self.world.running[self.worker, stream] = task
        self.requests[stream] = request
        task.add_done_callback(lambda _: self.world.running.pop((self.worker, stream), None))
        return stream

    def cancel(self, stream, on_rest=None):
        task = self.world.running.get((self.worker, stream))
        leg = self.requests[stream].leg
        if task is not None:
            task.cancel()
        if isinstance(leg, DecodeLeg) and leg.ticket is not None:
            self.world.drop(leg.ticket.params.decode())  # the decode worker tells the prefill worker

    def release(self, request):
        self.world.kept.discard((self.worker, request))


class Queue:
    """The prefill queue: p1 takes whatever comes."""

    def __init__(self, world):
        self._world = world

    async def prefill(self, model, request):
        ended = asyncio.get_running_loop().create_future()

        class Sink:
            def on_done(self, done):
                ended.set_result(Prefilled(WorkerId("p1"), done, request.request))

            def on_failed(self, failed):
                ended.set_exception(leg_error(failed, WorkerId("p1")))

            def on_lost(self, error):
                ended.set_exception(error)

        await self._world.run(WorkerId("p1"), request, Sink())
        return await ended

    def release(self, model, job, worker):
        self._world.kept.discard((worker, job))


class Scene:
    def __init__(self, mode, fault, *, policy="headrace", queue=False, workers=("p0", "p1", "d0", "d1")):
        self.world = World(mode, fault)
        self.router = Router(RouterSettings(), load_policy(policy), rng=random.Random(1))
        self.dispatcher = Dispatcher(self.router, clock=time.monotonic)
        self.world.on_lost = self.lost
        for name in workers:
            role = Role.PREFILL if name.startswith("p") else Role.DECODE
            known = registration(name, role, mode=mode)
            self.world.connections[known.worker] = Connection(self.world, name)
            self.world.registrations[known.worker] = known
            self.router.worker_up(known)
        self.relay = Relay(
            self.dispatcher,
            self.world,
            Metrics(),
            clock=time.monotonic,
            limits=ExchangeLimits(replacement_s=2.0),
            prefills=Queue(self.world) if queue else None,
        )

    def lost(self, worker):
        self.router.worker_down(worker)
        self.dispatcher.changed()

    async def serve(self, handover=HandoverPreference.AUTO, *, timeout_s=20.0, name="r", **sampling):
        now, response = time.monotonic(), FakeResponse()
        request = GatewayRequest(
            request=RequestId(name),
            model="sim",
            prompt=np.arange(1, 21, dtype=np.uint32),
            blocks=np.empty(0, np.uint64),
            block_size=16,
            sampling=Sampling(**{"max_tokens": NUM_TOKENS, "temperature": 0.0, **sampling}),
            format=Format("chat", "id", "sim", 0, is_streaming=True),
            arrived_at=now,
            deadline=now + timeout_s,
            options=HeaderOptions(handover),
        )
        await asyncio.wait_for(self.relay.run(request, response), 60)
        for _ in range(5):
            await asyncio.sleep(0)
        return response

    def assert_nothing_is_left(self):
        stats = self.router.stats(now=time.monotonic())
        assert (stats.bound, sum(stats.waiting.values()), self.dispatcher.num_waiting) == (0, 0, 0)
        assert self.world.kept == set(), "a KV cache that nobody will take"
        assert self.world.running == {}
        assert self.world.watchers == []
        self.dispatcher.stop()


HOWS = ["refused", "busy", "other role", "moved", "failed", "invalid", "lost", "silent", "expired"]
SAMPLINGS = {"early": {}, "drawn again": {"temperature": 1.0, "seed": 1}}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("leg", "at"),
    [("prefill", 0), ("prefill", 1), ("decode", 0), ("decode", 1), ("decode", 3), ("local", 0), ("local", 3)],
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("mode", ["pull", "push", "queue"])
async def test_a_leg_that_fails_is_made_good_or_the_client_told(mode, sampling, leg, at, how):
    queue, handover = mode == "queue", HandoverMode.PUSH if mode == "push" else HandoverMode.PULL
    scene = Scene(handover, Fault(leg, how, at), queue=queue)
    preference = HandoverPreference.NEVER if leg == "local" else HandoverPreference.ALWAYS
    is_silent = how == "silent" and not (leg == "prefill" and at)
    response = await scene.serve(preference, timeout_s=0.2 if is_silent else 20.0, **SAMPLINGS[sampling])
    assert response.is_ended
    if is_silent:
        told = response.payloads[-1] if response.payloads else response.body
        assert b'"code":"deadline"' in told
        assert WHOLE.startswith(b"".join(response.payloads[:-1]))
        observed = scene.router.explain(RequestId("r")).observed
        assert (observed.outcome, observed.failure.code) == (Outcome.FAILED, "deadline")
    else:
        assert b"".join(response.payloads) == WHOLE
    scene.assert_nothing_is_left()


@pytest.mark.parametrize("how", ["failed", "invalid", "busy"])
@pytest.mark.parametrize("mode", [HandoverMode.PULL, HandoverMode.PUSH])
@pytest.mark.parametrize("policy", ["headrace", "least_loaded", "dynamo", "round_robin"])
@pytest.mark.parametrize("broken", ["d0", "p0"])
async def test_one_broken_worker_takes_no_request_down_while_healthy_ones_stand_by(policy, mode, broken, how):
    leg = "decode" if broken == "d0" else "prefill"
    fault = Fault(leg, how, left=10**6, worker=broken)
    scene = Scene(mode, fault, policy=policy, workers=("p0", "p1", "p2", "d0", "d1"))
    busy = LoadReport(WorkerId("d1"), 1, WorkerState.READY, 7, 0, 0, 900, 3000, 0, 0, 0)
    scene.router.apply_load(busy, now=time.monotonic())  # the broken one looks idle, because everything fails there
    for number in range(10):
        response = await scene.serve(HandoverPreference.ALWAYS, name=f"r{number}", temperature=1.0, seed=1)
        assert b"".join(response.payloads) == WHOLE, (number, response.body, scene.world.legs)
        assert all(kind is not PrefillLeg or worker != "d0" for worker, kind in scene.world.legs)
    scene.assert_nothing_is_left()


async def test_a_worker_that_stays_busy_is_asked_a_few_times_and_the_client_told_to_come_back():
    scene = Scene(HandoverMode.PULL, Fault("local", "busy", left=10**6), workers=("d0",))
    response = await scene.serve()
    assert (response.status, response.headers["retry-after"]) == (429, "1")
    assert b'"code":"worker_busy"' in response.body
    assert len(scene.world.legs) == 3
    scene.assert_nothing_is_left()


async def test_workers_that_change_their_roles_cost_a_request_none_of_its_attempts():
    """Each time the gateway hears of it too late."""
    scene = Scene(HandoverMode.PULL, Fault("local", "other role", left=7), workers=("d0",))
    response = await scene.serve()
    assert b"".join(response.payloads) == WHOLE
    assert len(scene.world.legs) == 8
    scene.assert_nothing_is_left()


async def test_a_begun_answer_goes_on_as_soon_as_a_busy_worker_has_room():
    scene = Scene(HandoverMode.PULL, Fault("local", "lost", at=2), workers=("d0", "d1"))
    fault = scene.world.fault

    def then_busy(worker):
        scene.world.on_lost = scene.lost
        scene.lost(worker)
        fault.how, fault.left, fault.at = "busy", 5, 0  # more often than there are attempts

    scene.world.on_lost = then_busy
    response = await scene.serve()
    assert b"".join(response.payloads) == WHOLE
    assert [kind for _, kind in scene.world.legs] == [LocalLeg] * 7
    scene.assert_nothing_is_left()


@pytest.mark.parametrize("mode", list(HandoverMode))
async def test_an_abandoned_prompt_keeps_nothing(mode):
    scene = Scene(mode, Fault("decode", "silent"))
    task = asyncio.create_task(scene.serve(HandoverPreference.ALWAYS))
    while not scene.world.kept:  # noqa: ASYNC110 - it is there within a few turns
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(5):
        await asyncio.sleep(0)
    scene.assert_nothing_is_left()


@pytest.mark.parametrize("policy", ["流れ", "a\r\nset-cookie: b"])
async def test_a_policy_may_have_any_name(policy):
    scene = Scene(HandoverMode.PULL, Fault("local", "lost", left=0))
    named = load_policy("headrace")
    named.name = policy
    scene.router.configure(RouterSettings(), named)
    response = await scene.serve()
    assert b"".join(response.payloads) == WHOLE
    assert response.headers["x-headrace-policy"] == policy.encode("unicode_escape").decode()
    assert response.headers["x-headrace-policy"].isascii()
    assert response.headers["x-headrace-policy"].isprintable()
    scene.assert_nothing_is_left()
