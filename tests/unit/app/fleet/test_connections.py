import asyncio
import random
from contextlib import asynccontextmanager

import msgspec
import pytest

from app.fleet.connections import WorkerConnections
from app.prompt.card import CardUnusable
from app.serving.binding import Dispatcher
from planes.streams.client import WorkerUnreachable
from planes.wire.errors import HeadraceError
from planes.wire.messages import KvEvents, LoadReport, Role, Snapshot, WorkerId, WorkerState
from tests.fakes import FakeRouter, registration


class FakeStream:
    """A connection that ends when the test says so."""

    def __init__(self, to):
        self.to = to
        self.closed = asyncio.get_running_loop().create_future()
        self.num_streams = self.num_bytes_received = self.num_bytes_sent = 0

    def close(self):
        if not self.closed.done():
            self.closed.set_result("closed")


class Pauses(random.Random):
    """As long as the test says; none at first."""

    share = 0.0

    def uniform(self, a, b):
        return self.share


class World:
    """A fleet among fakes."""

    def __init__(self):
        self.router = FakeRouter()
        self.dispatcher = Dispatcher(self.router, clock=lambda: 5.0)
        self.streams: list[FakeStream] = []
        self.unreachable: set[str] = set()
        self.missing_models: set[str] = set()
        self.loaded: list[str] = []
        self.models: list[tuple] = []
        self.breaks: Exception | None = None
        self.snapshots = asyncio.Queue()
        self.asked: list[str] = []
        self.pauses = Pauses()
        self.fleet = WorkerConnections(
            self.router, self.dispatcher, self, self, connect=self.connect, clock=lambda: 5.0, rng=self.pauses
        )

    async def connect(self, worker):
        if worker.worker in self.unreachable:
            raise WorkerUnreachable(worker.worker, "refused")
        self.streams.append(FakeStream(worker))
        return self.streams[-1]

    def registered(self, worker):
        self.models.append(("registered", worker.worker, worker.state.value))

    def deregistered(self, worker):
        self.models.append(("deregistered", worker))

    def worker_up(self, worker):
        self.models.append(("up", worker))

    def worker_down(self, worker):
        self.models.append(("down", worker))

    async def load(self, worker):
        if self.breaks is not None:
            raise self.breaks
        if worker.model in self.missing_models:
            raise HeadraceError("no card yet")
        self.loaded.append(worker.model)

    async def request_snapshot(self, worker):
        self.asked.append(worker)
        return await self.snapshots.get()

    @asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.fleet.run())
        await settle()
        try:
            yield self
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            self.dispatcher.stop()


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def world():
    async with World().running() as world:
        yield world


def report(worker="d0", epoch=1, state=WorkerState.READY):
    return LoadReport(WorkerId(worker), epoch, state, 2, 1, 100, 50, 70, 3, 4, 0)


async def test_a_worker_is_up_for_routing_once_its_model_and_its_stream_are_there(world):
    worker = registration("d0")
    world.fleet.worker_up(worker)
    assert world.router.up == {}
    await settle()
    assert world.router.up == {"d0": worker}
    assert world.loaded == ["sim"]
    assert world.fleet.connection(WorkerId("d0")) is world.streams[0]
    assert world.fleet.is_serving
    assert world.fleet.num_connected == 1


async def test_workers_registered_before_the_start_are_connected_at_the_start():
    world = World()
    world.fleet.worker_up(registration("d0"))
    async with world.running():
        assert world.fleet.num_connected == 1


async def test_a_worker_is_tried_again_until_it_can_be_reached(world):
    world.unreachable.add("d0")
    world.missing_models.add("sim")
    world.fleet.worker_up(registration("d0"))
    await settle()
    with pytest.raises(WorkerUnreachable, match="its stream was lost"):
        world.fleet.connection(WorkerId("d0"))
    world.missing_models.clear()
    await settle()
    assert world.router.up == {}
    world.unreachable.clear()
    await settle()
    assert "d0" in world.router.up


async def test_a_lost_stream_takes_the_worker_down_until_it_is_back(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.unreachable.add("d0")
    world.streams[0].close()
    await settle()
    assert world.router.up == {}
    assert not world.fleet.is_serving
    world.unreachable.clear()
    await settle()
    assert "d0" in world.router.up
    assert len(world.streams) == 2


async def test_a_changed_registration_reaches_the_router_over_the_same_stream(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    draining = registration("d0", state=WorkerState.DRAINING)
    world.fleet.worker_up(draining)
    assert world.router.up == {"d0": draining}
    assert len(world.streams) == 1
    assert not world.fleet.is_serving


async def test_a_deregistered_worker_is_down_but_its_running_streams_may_end(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.streams[0].num_streams = 1
    world.fleet.worker_down(WorkerId("d0"))
    await settle()
    assert world.router.up == {}
    assert not world.streams[0].closed.done()
    with pytest.raises(WorkerUnreachable, match="not registered"):
        world.fleet.connection(WorkerId("d0"))
    world.streams[0].close()
    await settle()
    assert len(world.streams) == 1


async def test_an_idle_deregistered_worker_is_let_go_at_once(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.fleet.worker_down(WorkerId("d0"))
    assert world.streams[0].closed.done()
    world.fleet.worker_down(WorkerId("d0"))


async def test_a_worker_that_cannot_be_reached_is_forgotten_with_its_registration(world):
    world.unreachable.add("d0")
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.fleet.worker_down(WorkerId("d0"))
    world.unreachable.clear()
    await settle()
    assert world.streams == []


async def test_a_restarted_worker_gets_a_stream_of_its_own_and_the_old_end_does_not_take_it_down(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.streams[0].num_streams = 1
    world.fleet.worker_up(registration("d0", epoch=2))
    await settle()
    assert world.router.up["d0"].epoch == 2
    world.streams[0].close()
    await settle()
    assert world.router.up["d0"].epoch == 2
    assert world.fleet.connection(WorkerId("d0")) is world.streams[1]


async def test_events_and_reports_reach_the_router(world):
    world.fleet.worker_up(registration("d0"))
    batch = KvEvents(WorkerId("d0"), 1, 1, [])
    world.fleet.kv_changed(batch)
    world.fleet.load_reported(report())
    assert world.router.log[:2] == [batch, report()]
    (status,) = world.fleet.statuses()
    assert status.load == report()


async def test_what_comes_from_strangers_and_other_epochs_is_dropped(world):
    world.fleet.worker_up(registration("d0", epoch=2))
    for worker, epoch in (("d0", 1), ("d0", 3), ("d1", 2)):
        world.fleet.kv_changed(KvEvents(WorkerId(worker), epoch, 1, []))
        world.fleet.load_reported(report(worker, epoch=epoch))
    assert [each for each in world.router.log if each != "dispatch"] == []
    (status,) = world.fleet.statuses()
    assert status.load is None


async def test_malformed_events_are_no_reason_to_end(world):
    def malformed(batch):
        raise ValueError("7 bytes")

    world.fleet.worker_up(registration("d0"))
    world.router.apply_events = world.router.apply_load = malformed
    world.fleet.kv_changed(KvEvents(WorkerId("d0"), 1, 1, []))
    world.fleet.load_reported(report())


async def test_a_worker_whose_blocks_are_unknown_is_asked_for_a_snapshot_once_at_a_time(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.router.stale = [WorkerId("d0")]
    world.fleet.load_reported(report())
    world.fleet.load_reported(report())
    await settle()
    world.fleet.load_reported(report())
    await settle()
    assert world.asked == ["d0"]
    snapshot = Snapshot(WorkerId("d0"), 1, 3, b"")
    world.snapshots.put_nowait(snapshot)
    await settle()
    assert snapshot in world.router.log
    assert world.router.stale == []


async def test_gauges_count_workers_bytes_and_blocks(world):
    world.fleet.worker_up(registration("d0", Role.DECODE))
    world.fleet.worker_up(registration("p0", Role.PREFILL))
    world.fleet.load_reported(report())
    await settle()
    world.streams[0].num_bytes_received = 7
    gauges = {(gauge.name, *(value for _, value in gauge.labels)): gauge.value for gauge in world.fleet.gauges()}
    assert gauges["workers", "decode", "up"] == 1
    assert gauges["workers", "prefill", "up"] == 1
    assert gauges["stream_bytes", "received"] == 7
    assert gauges["worker_blocks", "d0"] == 4
    world.streams[0].close()
    await settle()
    gauges = {(gauge.name, *(value for _, value in gauge.labels)): gauge.value for gauge in world.fleet.gauges()}
    assert gauges["stream_bytes", "received"] == 7


async def test_models_are_listed_since_their_oldest_worker(world):
    world.fleet.worker_up(registration("d0", epoch=9 * 10**9))
    world.fleet.worker_up(registration("d1", epoch=7 * 10**9))
    world.fleet.worker_up(registration("d2", epoch=8 * 10**9, model="a"))
    assert world.fleet.models() == {"a": 8, "sim": 7}


async def test_a_model_is_pulled_while_a_connected_ready_worker_says_so(world):
    async with world.running():
        world.fleet.worker_up(registration("p0", Role.PREFILL))
        await settle()
        assert not world.fleet.is_pulled("sim")
        pulling = msgspec.structs.replace(registration("p1", Role.PREFILL), is_pulling=True)
        world.fleet.worker_up(pulling)
        assert not world.fleet.is_pulled("sim"), "not connected yet"
        await settle()
        assert world.fleet.is_pulled("sim")
        assert world.fleet.is_connected(WorkerId("p1"))
        assert not world.fleet.is_pulled("other")
        world.fleet.worker_up(msgspec.structs.replace(pulling, state=WorkerState.DRAINING))
        assert not world.fleet.is_pulled("sim")
        world.fleet.worker_down(WorkerId("p1"))
        assert not world.fleet.is_connected(WorkerId("p1"))


async def test_a_worker_that_loads_an_adapter_keeps_its_stream_and_the_router_hears_of_it(world):
    before = registration("d0", Role.DECODE)
    world.fleet.worker_up(before)
    await settle()
    connection = world.fleet.connection(WorkerId("d0"))
    loaded = msgspec.structs.replace(before, adapters={7: ""})
    world.fleet.worker_up(loaded)
    assert world.router.up == {"d0": loaded}
    assert world.fleet.connection(WorkerId("d0")) is connection


async def test_a_worker_whose_role_changes_keeps_its_stream_and_the_router_hears_of_it(world):
    before = registration("d0", Role.DECODE)
    world.fleet.worker_up(before)
    await settle()
    assert world.fleet.is_serving
    draining = msgspec.structs.replace(before, becoming=Role.PREFILL)
    world.fleet.worker_up(draining)
    assert world.router.up == {"d0": draining}
    assert not world.fleet.is_serving
    assert world.fleet.statuses()[0].becoming is Role.PREFILL
    after = msgspec.structs.replace(before, role=Role.PREFILL, is_pulling=True)
    world.fleet.worker_up(after)
    assert world.router.up == {"d0": after}
    assert world.fleet.is_pulled("sim")
    assert (len(world.streams), world.streams[0].closed.done()) == (1, False)


@pytest.mark.parametrize("error", [RecursionError("deep"), TypeError("5 is no list"), KeyError("x"), MemoryError()])
async def test_a_worker_whose_model_raises_anything_is_not_used_and_all_others_are(world, error):
    world.breaks, world.pauses.share = error, 1e6
    world.fleet.worker_up(registration("poison", model="poison"))
    await settle()
    assert world.router.up == {}
    world.breaks = None
    world.fleet.worker_up(registration("d0"))
    await settle()
    assert "d0" in world.router.up


async def test_a_worker_whose_card_is_refused_says_so_until_it_is_taken(world):
    world.breaks, world.pauses.share = CardUnusable("it renders otherwise"), 1e6
    world.fleet.worker_up(registration("d0"))
    await settle()
    (shown,) = world.fleet.statuses()
    assert (shown.refused_because, shown.is_connected) == ("it renders otherwise", False)
    (refused,) = [gauge.value for gauge in world.fleet.gauges() if gauge.name == "workers_refused"]
    assert refused == 1
    world.breaks = None
    world.fleet.worker_up(registration("d0", epoch=2))
    await settle()
    (shown,) = world.fleet.statuses()
    assert (shown.refused_because, shown.is_connected) == ("", True)


async def test_a_worker_that_the_router_cannot_take_is_not_used_and_all_others_are(world):
    refuse = world.router.worker_up

    def picky(worker):
        if worker.worker == "poison":
            raise ZeroDivisionError
        refuse(worker)

    world.router.worker_up, world.pauses.share = picky, 1e6
    world.fleet.worker_up(registration("poison"))
    world.fleet.worker_up(registration("d0"))
    await settle()
    assert set(world.router.up) == {"d0"}
    assert all(stream.closed.done() for stream in world.streams if stream.to.worker == "poison")
    assert ("down", "poison") in world.models
    assert not world.fleet.is_connected(WorkerId("poison"))


async def test_a_change_that_the_router_cannot_take_ends_the_use_of_that_worker(world):
    world.fleet.worker_up(registration("d0"))
    world.fleet.worker_up(registration("d1"))
    await settle()

    def refuse(worker):
        raise ZeroDivisionError

    world.router.worker_up = refuse
    world.fleet.worker_up(registration("d0", state=WorkerState.DRAINING))
    assert set(world.router.up) == {"d1"}


async def test_a_worker_that_drains_never_comes_back_whoever_is_late_to_say_so(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.fleet.load_reported(report(state=WorkerState.DRAINING))
    assert world.router.up["d0"].state is WorkerState.DRAINING
    assert world.models[-1] == ("registered", "d0", "draining")
    world.fleet.worker_up(registration("d0"))
    world.fleet.load_reported(report())
    assert world.router.up["d0"].state is WorkerState.DRAINING
    assert not world.fleet.is_serving
    (status,) = world.fleet.statuses()
    assert status.state is WorkerState.DRAINING


async def test_a_start_that_says_something_else_of_itself_is_another_start(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.fleet.worker_up(registration("d0", model="other"))
    await settle()
    assert world.router.up["d0"].model == "other"
    assert world.streams[0].closed.done()
    assert len(world.streams) == 2


async def test_the_models_are_told_who_is_there(world):
    world.fleet.worker_up(registration("d0"))
    await settle()
    world.unreachable.add("d0")
    world.streams[0].close()
    await settle()
    world.fleet.worker_down(WorkerId("d0"))
    assert world.models == [
        ("registered", "d0", "ready"),
        ("up", "d0"),
        ("down", "d0"),
        ("deregistered", "d0"),
    ]


async def test_workers_that_disagree_are_shown_as_long_as_they_do(world):
    world.fleet.worker_up(registration("d0"))
    assert world.fleet.splits == {}
    world.fleet.worker_up(registration("d1", card_digest="1" * 64))
    assert list(world.fleet.splits) == ["cards of sim"]
    gauges = {(gauge.name, *(value for _, value in gauge.labels)): gauge.value for gauge in world.fleet.gauges()}
    assert gauges["model_cards", "sim"] == 2
    world.fleet.worker_down(WorkerId("d0"))
    assert world.fleet.splits == {}
