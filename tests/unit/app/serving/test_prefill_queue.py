import asyncio

import msgspec
import pytest

from app.serving.errors import WorkerFailed
from app.serving.prefill_queue import NotQueued, QueuedPrefills
from planes.events import EventPlaneUnavailable
from planes.streams.client import WorkerLost
from planes.wire.frames import (
    Done,
    Failed,
    FailureKind,
    FinishReason,
    Format,
    Generate,
    PrefillLeg,
    Sampling,
    StreamId,
    Ticket,
    Usage,
)
from planes.wire.messages import HandoverMode, RequestId, WorkerId
from planes.wire.prefill_queue import OVERTRIED, PrefillNews, PrefillUnwanted, QueuedPrefill
from planes.work_queue import PrefillQueueFull, QueueStats

W1, W2 = WorkerId("w1"), WorkerId("w2")
LEG = Generate(StreamId(0), RequestId("r"), b"", Sampling(1), Format("chat", "", "m", 0), PrefillLeg(HandoverMode.PULL))
TICKET = Ticket(W1, HandoverMode.PULL, 1, 30.0, b"")
DONE = Done(StreamId(0), FinishReason.LENGTH, Usage(1, 1, 0), ticket=TICKET)


class FakePlane:
    def __init__(self):
        self.is_connected = True
        self.sent = []
        self.hear = self.connect = None

    def on_connect(self, callback):
        self.connect = callback

    def subject(self, kind, who):
        return f"{kind}.{who}"

    async def send(self, subject, payload):
        self.sent.append((subject, msgspec.msgpack.decode(payload, type=PrefillUnwanted)))

    async def subscribe(self, subject, kind, callback):
        assert (subject, kind) == ("prefilled.g", PrefillNews)
        self.hear = callback


class FakeQueue:
    def __init__(self):
        self.jobs, self.refusal = [], None
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def submit(self, model, payload, job_id, *, timeout_s):
        await self.may_answer.wait()
        if self.refusal is not None:
            raise self.refusal
        self.jobs.append((model, msgspec.msgpack.decode(payload, type=QueuedPrefill), job_id))

    async def stats(self, model):
        return QueueStats(3, 2, 1.5)


class FakePullers:
    def __init__(self):
        self.pulled, self.connected = True, {W1, W2}

    def models(self):
        return {"m": 0}

    def is_pulled(self, model):
        return self.pulled

    def is_connected(self, worker):
        return worker in self.connected


class World:
    def __init__(self):
        self.plane, self.queue, self.pullers = FakePlane(), FakeQueue(), FakePullers()
        self.prefills = QueuedPrefills(self.queue, self.plane, self.pullers, gateway="g", check_s=0.0)

    def ask(self):
        return asyncio.create_task(self.prefills.prefill("m", LEG))

    def news(self, worker=W1, **outcome):
        self.plane.hear(PrefillNews(RequestId("r.q"), "m", worker, **outcome))


@pytest.fixture
async def world():
    world = World()
    running = asyncio.create_task(world.prefills.run())
    await settle()
    yield world
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def settle():
    for _ in range(12):
        await asyncio.sleep(0)


async def test_a_job_names_the_leg_and_where_to_answer_and_is_answered_once(world):
    asking = world.ask()
    await settle()
    ((model, job, job_id),) = world.queue.jobs
    assert (model, job.answer_to, job.generate.request, job_id) == ("m", "prefilled.g", "r.q", "r.q")
    world.news()
    await settle()
    assert not asking.done()
    world.news(done=DONE)
    world.news(done=DONE)
    given = await asking
    assert (given.worker, given.done.ticket, given.job) == (W1, TICKET, "r.q")
    await settle()
    assert world.plane.sent == [], "the same answer twice gives nothing up"


async def test_a_second_worker_s_answer_is_ignored_and_its_kv_cache_given_up(world):
    asking = world.ask()
    await settle()
    world.news(W1, done=DONE)
    await asking
    world.news(W2, done=DONE)
    await settle()
    assert world.plane.sent == [("unwanted.m", PrefillUnwanted(RequestId("r.q"), W2))]


async def test_nobody_waiting_means_that_all_workers_are_told(world):
    asking = world.ask()
    await settle()
    asking.cancel()
    await settle()
    assert world.plane.sent == [("unwanted.m", PrefillUnwanted(RequestId("r.q"), None))]
    world.news(W1, done=DONE)
    await settle()
    assert world.plane.sent[1:] == [("unwanted.m", PrefillUnwanted(RequestId("r.q"), W1))]


async def test_an_answer_in_the_turn_in_which_nobody_waits_any_more_is_given_up(world):
    asking = world.ask()
    await settle()
    world.news(W1, done=DONE)
    asking.cancel()
    await settle()
    assert world.plane.sent == [("unwanted.m", PrefillUnwanted(RequestId("r.q"), W1))]


async def test_an_answer_to_a_job_that_the_queue_is_not_known_to_have_is_given_up(world):
    world.queue.may_answer.clear()
    asking = world.ask()
    await settle()
    world.news(W1, done=DONE)
    world.queue.refusal = EventPlaneUnavailable("no ack within 1 s")
    world.queue.may_answer.set()
    with pytest.raises(NotQueued):
        await asking
    await settle()
    assert world.plane.sent == [("unwanted.m", PrefillUnwanted(RequestId("r.q"), W1))]


async def test_what_is_unwanted_during_an_outage_is_told_after_it(world):
    asking = world.ask()
    await settle()
    world.plane.is_connected = False
    with pytest.raises(NotQueued) as away:
        await asking
    assert away.value.code == "event_plane_unavailable"
    assert world.plane.sent == []
    world.plane.is_connected = True
    world.plane.connect()
    await settle()
    assert world.plane.sent == [("unwanted.m", PrefillUnwanted(RequestId("r.q"), None))]


async def test_a_short_outage_ends_the_wait_too(world):
    asking = world.ask()
    await settle()
    world.plane.connect()
    with pytest.raises(NotQueued, match="NATS was away"):
        await asking


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (PrefillQueueFull("full"), "prefill_queue_full"),
        (EventPlaneUnavailable("away"), "event_plane_unavailable"),
    ],
)
async def test_what_the_queue_refuses_is_to_be_sent_directly(world, refusal, code):
    world.queue.refusal = refusal
    with pytest.raises(NotQueued) as refused:
        await world.ask()
    assert refused.value.code == code


async def test_so_is_what_nobody_pulls_or_pulls_any_more(world):
    asking = world.ask()
    await settle()
    world.pullers.pulled = False
    with pytest.raises(NotQueued, match="no worker of 'm' is left"):
        await asking
    with pytest.raises(NotQueued, match="no worker takes prefill jobs of 'm'"):
        await world.ask()
    assert len(world.queue.jobs) == 1


async def test_only_the_last_worker_to_get_a_job_is_waited_for(world):
    asking = world.ask()
    await settle()
    world.news(W1)
    world.pullers.connected = {W2}
    await settle()
    assert not asking.done(), "the queue gives it to another"
    world.news(W2, is_last_try=True)
    await settle()
    assert not asking.done()
    world.pullers.connected = set()
    with pytest.raises(WorkerLost, match="w2"):
        await asking


async def test_a_failure_is_the_worker_s(world):
    asking = world.ask()
    await settle()
    world.news(W2, failed=Failed(StreamId(0), FailureKind.INTERRUPTED, "engine_error", "no luck"))
    with pytest.raises(WorkerFailed) as failed:
        await asking
    assert (failed.value.worker, failed.value.code) == (W2, "engine_error")


async def test_a_job_that_too_many_have_tried_is_not_blamed_on_the_worker_that_says_so(world):
    asking = world.ask()
    await settle()
    world.news(W2, failed=Failed(StreamId(0), FailureKind.REJECTED, OVERTRIED, "3 workers took the job"))
    with pytest.raises(NotQueued, match="3 workers") as refused:
        await asking
    assert refused.value.code == OVERTRIED


async def test_the_queue_is_looked_at(world):
    await settle()
    assert {gauge.name: gauge.value for gauge in world.prefills.gauges()} == {
        "prefill_queue_depth": 3,
        "prefill_queue_in_progress": 2,
        "prefill_queue_oldest_seconds": 1.5,
    }
