"""What an elected gateway does with a decision, without etcd."""

import itertools

import msgspec
import pytest

from app.fleet.autorole import Autorole
from planes.election import OfficeLost
from planes.wire.messages import Role, RoleWish
from router.load import ModelLoad
from router.roles import RoleGoals, RolePlanner
from tests.fakes import DEEP, registration
from tests.unit.router.test_roles import ENGINE, WINDOW_S, load, status

MORNING = load(8, 8000, 40)


class FakeCandidate:
    """etcd with one office."""

    def __init__(self):
        self.is_holder = True
        self.told, self.others = b"", {}
        self.noted, self.wishes = [], []
        self.fails = None

    async def tell(self, value):
        self.told = value

    async def heard(self):
        return {"own": self.told, **self.others}

    async def note(self, value, *, ttl_s):
        self.noted.append(msgspec.json.decode(value))

    async def act(self, key, value, *, ttl_s, may):
        if self.fails is not None:
            raise self.fails
        assert may(None)
        self.wishes.append((key, msgspec.json.decode(value, type=RoleWish)))


class FakeRouter:
    """Each window brings the same."""

    def __init__(self, members, each):
        self.members, self.each, self.num_read = members, each, 0

    def loads(self):
        names, times = ModelLoad.__struct_fields__, self.num_read
        self.num_read += 1
        return {"sim": ModelLoad(**{name: times * getattr(self.each, name) for name in names})}

    def workers(self, *, now):
        return [status(member) for member in self.members]


class World:
    def __init__(self, each=MORNING):
        self.workers = [
            msgspec.structs.replace(registration(f"w{number:02}"), roles=tuple(Role), facts=ENGINE)
            for number in range(12)
        ]
        self.candidate = FakeCandidate()
        instants = itertools.count(0, WINDOW_S)
        self.autorole = Autorole(
            RolePlanner(RoleGoals(WINDOW_S)),
            self.candidate,
            FakeRouter(self.workers, each),
            lambda: self.workers,
            namespace="ns",
            gateway="g",
            clock=lambda: next(instants),
            wall_clock=lambda: 1.0,
        )

    async def windows(self, count):
        for _ in range(count):
            await self.autorole.window_ended()

    def metric(self, name):
        return sum(gauge.value for gauge in self.autorole.gauges() if gauge.name == name)


async def test_the_elected_gateway_wishes_for_what_was_decided_and_says_why():
    world = World()
    await world.windows(2)
    ((key, wish),) = world.candidate.wishes
    assert key == b"/headrace/ns/roles/w00"
    assert wish == RoleWish(1, Role.PREFILL, WINDOW_S, is_pin=False)
    told = world.autorole.told
    assert (told["is_elected"], told["last"]["gateway"]) == (True, "g")
    assert told["last"]["decisions"][0]["code"] == "change"
    assert world.candidate.noted[-1] == told["last"]
    assert world.metric("autorole_changes") == 1
    assert world.metric("autorole_pressure") > 1


async def test_who_is_not_elected_tells_its_load_and_changes_nothing():
    world = World()
    world.candidate.is_holder = False
    await world.windows(3)
    assert msgspec.json.decode(world.candidate.told)["sim"]["arrived"] == MORNING.arrived
    assert (world.candidate.wishes, world.candidate.noted) == ([], [])
    assert world.autorole.told == {"is_elected": False, "last": None}


async def test_what_other_gateways_tell_counts_too_and_what_cannot_be_read_does_not():
    world = World(load(2, 8000, 40))
    await world.windows(3)
    assert world.candidate.wishes == []
    world.candidate.others = {"other": msgspec.json.encode({"sim": load(6, 8000, 40)}), "newer": b"{", "deep": DEEP}
    await world.windows(2)
    assert len(world.candidate.wishes) == 1


@pytest.mark.parametrize(
    "told",
    [
        {"arrived": 20, "ended": 20, "stream_tokens": 5},
        {"arrived": 20, "ended": 20, "stream_tokens": 5, "streams": 2, "with_itl": 1},
        {"arrived": 1e18, "ended": 1e-300, "prompt_tokens": 1e-300, "stream_tokens": 1e18, "streams": 1e-300},
    ],
    ids=["no streams", "no SLO", "absurd"],
)
async def test_what_another_gateway_tells_that_cannot_be_costs_no_decision_after_it(told):
    world = World()
    world.candidate.others = {"other": msgspec.json.encode({"sim": told, "other": told})}
    await world.windows(2)
    world.candidate.others = {}
    await world.windows(2)
    assert world.candidate.wishes
    assert world.candidate.noted[-1]


async def test_a_newly_elected_gateway_begins_anew():
    world = World()
    await world.windows(1)
    world.candidate.is_holder = False
    await world.windows(1)
    world.candidate.is_holder = True
    await world.windows(1)
    assert world.candidate.wishes == [], "what it wanted before is no second window"


async def test_a_wish_that_etcd_refuses_is_no_change():
    world = World()
    await world.windows(1)
    world.candidate.fails = OfficeLost("not held any more")
    with pytest.raises(OfficeLost):
        await world.windows(1)
    assert world.metric("autorole_changes") == 0
