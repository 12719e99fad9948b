import asyncio

import msgspec
import pytest
from structlog.testing import capture_logs

from planes.wire.messages import Role, RoleWish, WorkerId, WorkerState
from tests.fakes import registration
from workers.role import RoleKeeper

PREFILL, DECODE, BOTH = Role.PREFILL, Role.DECODE, Role.BOTH


class FakeServer:
    """Requests by what they need: `prompts` and `answers`."""

    def __init__(self, role, log):
        self.role, self.log = role, log
        self.prompts = self.answers = 0
        self.ended = asyncio.Event()

    def change_role(self, role):
        self.role = role
        self.log.append(("takes", role))

    def num_beyond(self, role):
        return (0 if role.can_prefill else self.prompts) + (0 if role.can_decode else self.answers)

    def move_beyond(self, role):
        self.log.append(("moves", self.num_beyond(role)))
        self.end()

    async def until_within(self, role):
        while self.num_beyond(role):
            self.ended.clear()
            await self.ended.wait()

    def end(self):
        self.prompts = self.answers = 0
        self.ended.set()


class FakeRegistrar:
    def __init__(self, log):
        self.log, self.told = log, asyncio.Event()
        self.told.set()

    def update(self, told):
        self.log.append(("registered", told.role, told.becoming))

    async def until_told(self):
        await self.told.wait()


class FakePuller:
    def __init__(self, log):
        self.log = log

    def pause(self):
        self.log.append("pause")

    def resume(self):
        self.log.append("resume")


class World:
    def __init__(self, role=BOTH, *, roles=tuple(Role), has_queue=False):
        self.log = []
        own = msgspec.structs.replace(registration("w", role, epoch=7), roles=roles, is_pulling=has_queue)
        self.server, self.registrar = FakeServer(role, self.log), FakeRegistrar(self.log)
        puller = FakePuller(self.log) if has_queue else None
        self.keeper = RoleKeeper(own, self.server, self.registrar, puller, news_s=0.0)

    async def wish(self, role, *, epoch=7, migrate_after_s=None, is_pin=True):
        self.keeper.wished(WorkerId("w"), RoleWish(epoch, role, migrate_after_s, is_pin))
        await settle()

    async def end(self):
        self.server.end()
        await settle()

    @property
    def is_now(self):
        return self.keeper.registration.role, self.keeper.registration.becoming


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def run():
    tasks = []

    def start(*arguments, **changes):
        world = World(*arguments, **changes)
        tasks.append(asyncio.create_task(world.keeper.run()))
        return world

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("before", Role)
@pytest.mark.parametrize("wanted", Role)
async def test_an_idle_worker_becomes_whatever_it_is_asked_to_be(run, before, wanted):
    world = run(before)
    await world.wish(wanted)
    assert world.is_now == (wanted, None)
    assert world.server.role is wanted


@pytest.mark.parametrize(
    ("before", "wanted", "prompts", "answers"),
    [(DECODE, PREFILL, 0, 3), (BOTH, PREFILL, 2, 3), (PREFILL, DECODE, 2, 0), (BOTH, DECODE, 2, 3)],
)
async def test_what_a_worker_gives_up_ends_before_it_has_its_new_role(run, before, wanted, prompts, answers):
    world = run(before)
    world.server.prompts, world.server.answers = prompts, answers
    await world.wish(wanted)
    assert world.is_now == (before, wanted)
    common = wanted if before is BOTH else None
    assert world.keeper.registration.takes is common
    assert world.server.role is common
    await world.end()
    assert world.is_now == (wanted, None)
    assert world.log[-3:] == [("takes", common), ("takes", wanted), ("registered", wanted, None)]


@pytest.mark.parametrize("before", [PREFILL, DECODE])
async def test_a_worker_that_gives_nothing_up_waits_for_nothing(run, before):
    world = run(before)
    world.server.prompts = world.server.answers = 5
    await world.wish(BOTH)
    assert world.log[-2:] == [("takes", BOTH), ("registered", BOTH, None)]


async def test_nothing_is_refused_before_etcd_has_been_told(run):
    world = run(DECODE)
    world.registrar.told.clear()
    await world.wish(PREFILL)
    assert world.log == [("takes", DECODE), ("registered", DECODE, PREFILL)]
    world.registrar.told.set()
    await settle()
    assert world.is_now == (PREFILL, None)


async def test_a_wish_for_an_earlier_life_or_for_what_the_engine_cannot_be_is_refused_and_told(run):
    world = run(DECODE, roles=(DECODE, BOTH))
    with capture_logs() as logs:
        await world.wish(BOTH, epoch=6)
        await world.wish(BOTH, epoch=8)
        await world.wish(PREFILL)
    assert world.log == []
    assert [(log["event"], log["role"]) for log in logs] == [
        ("role.refused", BOTH),
        ("role.refused", BOTH),
        ("role.refused", PREFILL),
    ]
    assert "epoch 6, and this one's is 7" in logs[0]["reason"]
    assert "started to be decode" in logs[2]["reason"]


async def test_another_wish_in_the_middle_of_a_drain_counts_from_the_role_that_it_has(run):
    world = run(DECODE)
    world.server.answers = 3
    await world.wish(PREFILL)
    await world.wish(DECODE)
    assert (world.is_now, world.server.role) == ((DECODE, None), DECODE)
    await world.wish(PREFILL)
    await world.wish(BOTH)
    assert (world.is_now, world.server.role) == ((BOTH, None), BOTH)
    await world.end()
    assert world.is_now == (BOTH, None)


async def test_what_is_taken_back_is_taken_at_once_again(run):
    """Both, then prefill alone, then decode alone: answers are routed here as soon as that is registered."""
    world = run(BOTH)
    world.server.prompts, world.server.answers = 2, 3
    await world.wish(PREFILL)
    assert world.server.role is PREFILL
    world.registrar.told.clear()
    await world.wish(DECODE)
    assert (world.is_now, world.server.role) == ((BOTH, DECODE), BOTH)


async def test_the_same_wish_again_and_one_that_is_gone_change_nothing(run):
    world = run(DECODE)
    await world.wish(PREFILL)
    log = list(world.log)
    await world.wish(PREFILL)
    world.keeper.wished(WorkerId("w"), None)
    await settle()
    assert world.log == log


async def test_a_role_wished_for_by_hand_is_pinned_until_a_wish_gives_it_back(run):
    world = run(DECODE)
    await world.wish(PREFILL, is_pin=False)
    assert not world.keeper.registration.is_pinned
    world.server.prompts = 2
    await world.wish(DECODE)
    assert world.keeper.registration.is_pinned, "while it drains too"
    await world.wish(DECODE, is_pin=False)
    assert (world.is_now, world.keeper.registration.is_pinned) == ((PREFILL, DECODE), False)
    await world.end()
    assert (world.is_now, world.keeper.registration.is_pinned) == ((DECODE, None), False)


async def test_what_does_not_end_in_time_is_moved_where_that_was_wished(run):
    world = run(DECODE)
    world.server.answers = 3
    await world.wish(PREFILL, migrate_after_s=0.0)
    async with asyncio.timeout(60):
        while world.is_now != (PREFILL, None):  # noqa: ASYNC110 - a timer of 0 s is all there is to wait for
            await asyncio.sleep(0)
    assert ("moves", 3) in world.log


async def test_a_worker_that_stops_never_comes_back(run):
    world = run(DECODE)
    world.server.answers = 1
    await world.wish(PREFILL)
    world.keeper.drain()
    assert world.keeper.registration.state is WorkerState.DRAINING
    await world.end()
    assert world.keeper.registration.state is WorkerState.DRAINING


async def test_the_queue_is_left_alone_while_no_prompts_are_taken(run):
    world = run(DECODE, has_queue=True)
    assert world.log == ["pause"]
    await world.wish(PREFILL)
    assert (world.log[-1], world.keeper.registration.is_pulling) == ("resume", True)
    world.server.prompts = 1
    await world.wish(DECODE)
    assert (world.log[-2:], world.keeper.registration.is_pulling) == (["pause", ("takes", None)], False)
