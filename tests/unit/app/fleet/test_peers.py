import asyncio
import random
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.fleet.peers import BEAT_S, GatewayPeers, PeerNews
from app.serving.binding import Dispatcher
from planes.wire.messages import GatewayNews, RequestId, RequestReleased, WorkerId
from router.policies.least_loaded import LeastLoaded
from router.request import Observed, RoutableRequest
from router.router import Router
from tests.fakes import FakeNewsPlane, registration

A, B, C = "a" * 16, "b" * 16, "c" * 16


class Site:
    """Gateways with routers of their own before the same worker; what they publish goes where it is carried."""

    def __init__(self, *names):
        self.now = 0.0
        self.peers, self.routers, self.woken = {}, {}, []
        for name in names:
            self.start(name)

    def start(self, name):
        router = self.routers[name] = Router(policy=LeastLoaded(), rng=random.Random(0))
        router.worker_up(registration("both-1"))
        self.peers[name] = GatewayPeers(router, name=name, wake=lambda: self.woken.append(name))

    def bind(self, name, request):
        self.routers[name].submit(routable(request), now=self.now)
        (route,) = self.routers[name].dispatch(now=self.now)
        return route

    def release(self, name, request):
        self.routers[name].release(RequestId(request), Observed(completion_tokens=4), now=self.now)

    def tell(self, name, *, hear=None):
        """What a gateway has to tell goes to all others, or to those that hear it."""
        messages = self.peers[name].take(now=self.now)
        for message in messages:
            for other, peers in self.peers.items():
                if hear is None or other in hear:
                    peers.hear(carried(message), now=self.now)
        return messages

    def beat(self):
        self.now += BEAT_S
        for name in self.peers:
            self.peers[name].beat(now=self.now)
        for _ in range(2):  # those that are found not to be heard tell all
            for name in self.peers:
                self.tell(name)

    def counted(self, name):
        stats = self.routers[name].stats(now=self.now)
        return stats.bound, stats.peers_bound


def routable(request):
    return RoutableRequest(RequestId(request), "sim", np.zeros(0, dtype=np.uint64), 40, 8, 1e9)


def carried(message):
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=GatewayNews)


def test_what_one_gateway_binds_counts_for_the_other_until_it_ends():
    site = Site(A, B)
    site.beat()
    site.bind(A, "r")
    assert site.counted(B) == (0, 0)
    site.tell(A)
    assert site.counted(B) == (0, 1)
    (worker,) = site.routers[B].workers(now=site.now)
    assert worker.num_running == 1
    site.release(A, "r")
    site.tell(A)
    assert site.counted(B) == (0, 0)
    assert site.routers[B].workers(now=site.now)[0].num_running == 0


def test_one_that_starts_later_learns_what_is_there_and_goes_on_from_it():
    site = Site(A, B)
    site.beat()
    site.bind(A, "early")
    site.tell(A)
    site.start(C)
    site.bind(A, "late")
    site.tell(A)
    assert site.counted(C) == (0, 0), "something was told before it was there"
    site.beat()
    assert site.counted(C) == (0, 2)
    site.release(A, "early")
    site.tell(A)
    assert site.counted(B) == site.counted(C) == (0, 1)


def test_one_that_missed_something_forgets_the_rest_until_it_is_told_all():
    site = Site(A, B)
    site.beat()
    for request in "xy":
        site.bind(A, request)
    site.tell(A)
    site.release(A, "x")
    site.tell(A, hear=())
    site.bind(A, "z")
    site.tell(A)
    assert site.counted(B) == (0, 0)
    site.beat()
    assert site.counted(B) == (0, 2)


def test_one_that_falls_silent_is_forgotten_and_heard_again_when_it_is_back():
    site = Site(A, B)
    site.beat()
    site.bind(A, "r")
    site.tell(A)
    for _ in range(5):
        site.now += BEAT_S
        site.peers[B].beat(now=site.now)
    assert site.counted(B) == (0, 0)
    assert [gauge.value for gauge in site.peers[B].gauges()] == [0]
    site.beat()
    assert site.counted(B) == (0, 1)
    assert [gauge.value for gauge in site.peers[B].gauges()] == [1]


def test_one_alone_tells_only_that_it_is_there():
    site = Site(A)
    site.beat()
    site.bind(A, "r")
    assert site.tell(A) == []
    site.peers[A].beat(now=site.now)
    assert site.tell(A) == [GatewayNews(A, 2, hears=[])]


def test_a_number_that_was_told_before_is_a_gap_too():
    """Else one message with a number far ahead would make all that follow it old."""
    site = Site(A, B)
    site.beat()
    site.peers[B].hear(GatewayNews(A, 2**62, is_whole=True), now=site.now)
    site.bind(A, "r")
    site.tell(A)
    assert site.counted(B) == (0, 0)
    site.beat()
    assert site.counted(B) == (0, 1)


def test_everything_is_told_once_and_then_ever_more_seldom_whoever_asks_how_often():
    site = Site(A, B)
    site.beat()
    site.bind(A, "r")
    wholes = []
    for _ in range(200):
        site.now += 0.25
        site.peers[A].hear(GatewayNews(C, 7, hears=[]), now=site.now)
        wholes += [site.now for message in site.peers[A].take(now=site.now) if message.is_whole]
    pauses = [later - earlier for earlier, later in pairwise(wholes)]
    assert pauses == [2.0, 4.0, 8.0, 16.0]


def test_one_that_hears_without_a_gap_is_not_disturbed_by_what_is_told_for_another():
    site = Site(A, B)
    site.beat()
    site.bind(A, "r")
    site.tell(A)
    site.start(C)
    told = []
    site.routers[B].forget_gateway = lambda *args, **fields: told.append(args)
    site.beat()
    assert site.counted(C) == (0, 1)
    assert site.counted(B) == (0, 1)
    assert not told


def test_one_that_nobody_is_left_to_hear_tells_by_its_number_that_it_stopped():
    site = Site(A, B)
    site.beat()
    site.bind(A, "r")
    site.tell(A)
    for _ in range(5):  # B's messages are lost, A's are not
        site.now += BEAT_S
        site.peers[A].beat(now=site.now)
        site.tell(A)
        site.peers[B].beat(now=site.now)
    assert site.counted(B) == (0, 0)


def test_what_was_told_of_a_worker_that_comes_up_later_is_asked_for_again():
    site = Site(A, B)
    for router in site.routers.values():
        router.worker_up(registration("both-2"))
    site.routers[B].worker_down(WorkerId("both-1"))
    site.routers[B].worker_down(WorkerId("both-2"))
    site.beat()
    site.bind(A, "r")
    site.bind(A, "s")
    site.tell(A)
    for _ in range(3):
        site.beat()
    assert site.counted(B) == (0, 0)
    assert [gauge.value for gauge in site.peers[B].gauges()] == [1]
    for name in ("both-1", "both-2"):
        site.routers[B].worker_up(registration(name))
    site.beat()
    assert site.counted(B) == (0, 2)


def test_only_the_end_of_a_request_is_a_reason_to_look_for_room():
    site = Site(A, B)
    site.beat()
    heard = []
    hear = site.peers[B].hear
    site.peers[B].hear = lambda news, now: heard.append(hear(news, now=now))
    site.bind(A, "r")
    site.tell(A)
    site.beat()
    assert not any(heard)
    site.release(A, "r")
    site.tell(A)
    assert heard[-1]


def test_as_many_gateways_as_there_may_be_are_remembered():
    site = Site(A)
    for number in range(2000):
        site.peers[A].hear(GatewayNews(f"{number:016x}", 1), now=site.now)
    assert len(site.peers[A].alive) == 1024


def test_all_of_many_is_told_in_several_messages():
    site = Site(A, B)
    for number in range(2100):
        site.bind(A, f"r{number}")
    site.peers[B].beat(now=site.now)
    site.tell(B)
    messages = site.tell(A)
    assert [message.is_whole for message in messages] == [True, False, False, False, False]
    assert site.counted(B) == (0, 2100)


def test_each_is_woken_once_for_what_it_has_to_tell():
    site = Site(A, B)
    site.beat()
    site.woken.clear()
    for request in "xyz":
        site.bind(A, request)
    assert site.woken == [A]


def test_what_cannot_be_taken_in_is_logged_and_asked_for_again(monkeypatch):
    site = Site(A, B)
    site.beat()
    site.bind(A, "r")
    monkeypatch.setattr(site.routers[B], "apply_news", None)
    site.tell(A)
    monkeypatch.undo()
    site.beat()
    assert site.counted(B) == (0, 1)


@pytest.mark.parametrize(
    "message",
    [
        GatewayNews("nobody", 1),
        GatewayNews(A, -1),
        GatewayNews(A, 1, [RequestReleased("", 1)]),
        GatewayNews(A, 1, [RequestReleased("r", -1)]),
        GatewayNews(A, 1, hears=["nobody"]),
        GatewayNews(A, 1, hears=[A] * 2000),
        GatewayNews(A, 1, [RequestReleased("r", 1)] * 2000),
    ],
)
def test_what_is_out_of_range_does_not_decode(message):
    with pytest.raises(msgspec.ValidationError):
        carried(message)


ACTS = st.tuples(st.sampled_from(["bind", "prefilled", "release", "tell", "lose", "beat"]), st.sampled_from([A, B, C]))


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTS, max_size=60))
def test_after_any_losses_all_count_the_same_in_the_end(acts):  # noqa: C901 - a branch a rule
    site = Site(A, B, C)
    bound = {name: [] for name in (A, B, C)}
    for number, (act, name) in enumerate(acts):
        site.now += 0.01
        match act, bound[name]:
            case "bind", requests:
                site.bind(name, f"r{number}")
                requests.append(f"r{number}")
            case "prefilled", [*_, request]:
                site.routers[name].prefilled(RequestId(request), now=site.now)
            case "release", [request, *_]:
                bound[name].remove(request)
                site.release(name, request)
            case "tell", _:
                site.tell(name)
            case "lose", _:
                site.tell(name, hear=[A, B, C][: number % 3])
            case "beat", _:
                site.beat()
    for _ in range(2):
        site.beat()
    total = sum(map(len, bound.values()))
    for name, requests in bound.items():
        assert site.counted(name) == (len(requests), total - len(requests))
        for request in requests:
            site.release(name, request)
    site.beat()
    for router in site.routers.values():
        (worker,) = router.workers(now=site.now + 100.0)
        assert (worker.num_running, worker.num_waiting, worker.kv_tokens, worker.queue_s) == (0, 0, 0, 0.0)


async def test_over_a_plane_what_is_bound_is_told_without_being_asked():
    plane, router = FakeNewsPlane(), Router(rng=random.Random(0))
    router.worker_up(registration("both-1"))
    dispatcher = Dispatcher(router, clock=lambda: 0.0)
    peers = PeerNews(router, dispatcher, plane, name=A, clock=lambda: 0.0)
    running = asyncio.create_task(peers.run())
    peers.told(GatewayNews(B, 1, hears=[A]))
    dispatcher.submit(routable("r"), lambda route: None)
    async with asyncio.timeout(10):
        while not (news := (await plane.next()).news):
            pass
    running.cancel()
    dispatcher.stop()
    assert [told.request for told in news] == ["r"]
