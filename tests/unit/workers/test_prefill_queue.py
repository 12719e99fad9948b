import asyncio

import msgspec
import pytest

from planes.events import EventPlaneUnavailable
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
    Usage,
)
from planes.wire.messages import HandoverMode, RequestId, WorkerId
from planes.wire.prefill_queue import PrefillNews, PrefillUnwanted, QueuedPrefill
from planes.work_queue import JobLimits
from tests.fakes import DEEP_PACKED
from workers.engine.base import EngineLoad
from workers.prefill_queue import Puller

DONE = Done(StreamId(0), FinishReason.LENGTH, Usage(1, 1, 0))
BUSY = Failed(StreamId(0), FailureKind.REJECTED, "worker_draining", "stops")
BROKEN = Failed(StreamId(0), FailureKind.INTERRUPTED, "engine_error", "no luck")


def payload(timeout_s=100.0):
    generate = Generate(
        StreamId(9),
        RequestId("r.q"),
        b"",
        Sampling(1),
        Format("chat", "", "m", 0),
        PrefillLeg(HandoverMode.PULL),
        timeout_s=timeout_s,
    )
    return msgspec.msgpack.encode(QueuedPrefill(generate, "prefilled.g"))


class FakeJob:
    def __init__(self, name="r.q", *, content=None, num_deliveries=1, age_s=1.0):
        self.payload = payload() if content is None else content
        self.job_id, self.num_deliveries, self.age_s = name, num_deliveries, age_s
        self.said, self.num_progress = [], 0

    async def ack(self):
        self.said.append("ack")

    async def nak(self):
        self.said.append("nak")

    async def in_progress(self):
        self.num_progress += 1


class FakeQueue:
    def __init__(self):
        self.limits = JobLimits(ack_wait_s=0.03)
        self.jobs, self.asked, self.is_away = asyncio.Queue(8), [], False
        self.coming = None  # a job that arrives in the same turn as a cancellation, which it swallows

    async def pull(self, model, max_batch, *, timeout_s):
        if self.is_away:
            raise EventPlaneUnavailable("away")
        self.asked.append(max_batch)
        try:
            return [await self.jobs.get()]
        except asyncio.CancelledError:
            if self.coming is None:
                raise
            return [self.coming]


class FakePlane:
    def __init__(self):
        self.sent, self.hear, self.is_away = [], None, False

    def subject(self, kind, who):
        return f"{kind}.{who}"

    async def subscribe(self, subject, kind, callback):
        assert (subject, kind) == ("unwanted.m", PrefillUnwanted)
        self.hear = callback

    async def send(self, subject, payload):
        if self.is_away:
            raise EventPlaneUnavailable("away")
        assert subject == "prefilled.g"
        self.sent.append(msgspec.msgpack.decode(payload, type=PrefillNews))


class FakeServer:
    def __init__(self):
        self.runs, self.requests, self.cancelled = [], [], []

    def generate(self, run, request):
        self.runs.append(run)
        self.requests.append(request)

    def cancel(self, run, stream):
        self.cancelled.append(run)


class FakeEngine:
    def __init__(self):
        self.waiting, self.aborted = 0, []

    def load(self):
        return EngineLoad(num_waiting=self.waiting)

    def abort(self, request):
        self.aborted.append(request)


class World:
    def __init__(self):
        self.queue, self.plane, self.server, self.engine = FakeQueue(), FakePlane(), FakeServer(), FakeEngine()
        self.puller = Puller(WorkerId("w"), "m", self.queue, self.plane, self.server, self.engine, pull_ahead=2)

    async def pulled(self, job):
        await self.queue.jobs.put(job)
        await settle()
        return job

    def outcomes(self):
        return [news for news in self.plane.sent if news.done or news.failed]


@pytest.fixture
async def world():
    world = World()
    running = asyncio.create_task(world.puller.run())
    await settle()
    yield world
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the fakes have nothing to wait for
            await asyncio.sleep(0.001)


async def test_a_job_is_run_told_and_acknowledged(world):
    job = await world.pulled(FakeJob())
    (request,) = world.server.requests
    assert (request.request, request.stream, request.timeout_s) == ("r.q", 0, 99.0)
    assert world.plane.sent == [PrefillNews(RequestId("r.q"), "m", WorkerId("w"))]
    assert job.said == []
    world.server.runs[0].post(DONE)
    await settle()
    assert world.outcomes() == [PrefillNews(RequestId("r.q"), "m", WorkerId("w"), done=DONE)]
    assert job.said == ["ack"]


async def test_while_it_is_computed_the_queue_is_told_so(world):
    job = await world.pulled(FakeJob())
    await until(lambda: job.num_progress >= 2)
    again = await world.pulled(FakeJob(num_deliveries=2))
    assert (len(world.server.runs), again.said) == (1, []), "we are at it already"


async def test_there_is_room_for_as_many_as_do_not_wait(world):
    assert world.queue.asked == [2]
    world.engine.waiting = 1
    await world.pulled(FakeJob("a"))
    await until(lambda: len(world.queue.asked) == 2)
    assert world.queue.asked == [2, 1]
    world.engine.waiting = 2
    await world.pulled(FakeJob("b"))
    assert len(world.queue.asked) == 2
    world.engine.waiting = 0
    await until(lambda: len(world.queue.asked) == 3)


LATER_VERSION = msgspec.msgpack.encode(
    {"generate": {"type": "generate", "leg": {"type": "new"}}, "answer_to": "prefilled.g"}
)


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (FakeJob(age_s=101.0), "deadline_exceeded"),
        (FakeJob(num_deliveries=4), "prefill_queue_overtried"),
        (FakeJob(content=LATER_VERSION), "prefill_job_unreadable"),
    ],
    ids=["too old", "tried too often", "of a later version"],
)
async def test_what_cannot_be_run_any_more_leaves_the_queue_and_its_gateway_is_told(world, job, code):
    await world.pulled(job)
    assert (job.said, world.server.runs) == (["ack"], [])
    (news,) = world.plane.sent
    assert (news.job, news.failed.kind, news.failed.code) == ("r.q", FailureKind.REJECTED, code)


@pytest.mark.parametrize("content", [b"\xc1", DEEP_PACKED], ids=["broken", "deep"])
async def test_what_nobody_can_read_leaves_the_queue(world, content):
    job = await world.pulled(FakeJob(content=content))
    assert (job.said, world.server.runs, world.plane.sent) == (["ack"], [], [])


async def test_what_is_unwanted_before_it_is_pulled_is_not_run(world):
    world.plane.hear(PrefillUnwanted(RequestId("r.q")))
    job = await world.pulled(FakeJob())
    assert (job.said, world.server.runs) == (["ack"], [])


async def test_what_becomes_unwanted_is_stopped(world):
    job = await world.pulled(FakeJob())
    world.plane.hear(PrefillUnwanted(RequestId("r.q"), WorkerId("other")))
    await settle()
    assert job.said == []
    world.plane.hear(PrefillUnwanted(RequestId("r.q"), WorkerId("w")))
    await settle()
    assert job.said == ["ack"]
    assert world.server.cancelled[0] is world.server.runs[0]
    assert world.outcomes() == []


async def test_what_is_unwanted_when_it_has_ended_gives_its_kv_cache_up(world):
    await world.pulled(FakeJob())
    world.server.runs[0].post(DONE)
    await settle()
    world.plane.hear(PrefillUnwanted(RequestId("r.q"), WorkerId("w")))
    assert world.engine.aborted == ["r.q"]


async def test_a_job_that_this_worker_cannot_do_now_is_given_back_unless_nobody_is_left(world):
    job, last = await world.pulled(FakeJob("a")), await world.pulled(FakeJob("b", num_deliveries=3))
    for run in list(world.server.runs):
        run.post(BUSY)
    await settle()
    assert (job.said, last.said) == (["nak"], ["ack"])
    assert [(news.job, news.failed, news.is_last_try) for news in world.outcomes()] == [("b", BUSY, True)]


async def test_a_kv_cache_that_is_kept_for_the_gateway_is_not_taken_back(world):
    await world.pulled(FakeJob())
    world.server.runs[0].post(DONE)
    await settle()
    assert (world.server.cancelled, world.engine.aborted) == ([], [])


async def test_a_failure_of_the_job_is_told(world):
    job = await world.pulled(FakeJob())
    world.server.runs[0].post(BROKEN)
    await settle()
    assert [news.failed for news in world.outcomes()] == [BROKEN]
    assert job.said == ["ack"]


async def test_an_outcome_that_cannot_be_told_in_time_gives_its_kv_cache_up(world):
    job = await world.pulled(FakeJob())
    world.plane.is_away = True
    world.server.runs[0].post(DONE)
    await until(lambda: world.engine.aborted)
    assert world.engine.aborted == ["r.q"]
    assert "ack" not in job.said


async def test_stopped_it_pulls_no_more_and_ends_what_it_has(world):
    job = await world.pulled(FakeJob())
    world.puller.stop()
    await settle()
    late = await world.pulled(FakeJob("late"))
    ending = asyncio.create_task(world.puller.until_idle(5.0))
    await settle()
    assert not ending.done()
    world.server.runs[0].post(DONE)
    await ending
    assert (job.said, late.said) == (["ack"], [])


async def test_paused_it_ends_what_it_has_and_pulls_no_more_until_it_is_told_to(world):
    job = await world.pulled(FakeJob())
    world.puller.pause()
    await settle()
    late = await world.pulled(FakeJob("late"))
    world.server.runs[0].post(DONE)
    await until(lambda: job.said == ["ack"])
    assert len(world.server.runs) == 1
    world.puller.resume()
    await until(lambda: len(world.server.runs) == 2)
    world.server.runs[1].post(DONE)
    await until(lambda: late.said == ["ack"])


async def test_a_pause_that_is_over_at_once_changes_nothing(world):
    world.puller.pause()
    world.puller.resume()
    job = await world.pulled(FakeJob())
    world.server.runs[0].post(DONE)
    await until(lambda: job.said == ["ack"])


async def test_a_job_that_came_as_the_worker_s_role_changed_is_another_one_s(world):
    job = await world.pulled(FakeJob())
    world.server.runs[0].post(Failed(StreamId(0), FailureKind.REJECTED, "role_changed", "it decodes"))
    await until(lambda: job.said == ["nak"])
    assert world.outcomes() == []


async def test_stopped_while_a_job_arrives_it_gives_the_job_back_and_ends():
    world = World()
    running = asyncio.create_task(world.puller.run())
    await settle()
    world.queue.coming = FakeJob("coming")
    world.puller.stop()
    await settle()
    world.server.runs[0].post(BUSY)  # what a draining server says at once
    async with asyncio.timeout(60):
        await running
    assert world.queue.coming.said == ["nak"]
    assert len(world.queue.asked) == 1
