import asyncio

import numpy as np
import pytest

from app.serving.binding import Dispatcher
from planes.wire.errors import Rejected
from planes.wire.messages import RequestId
from router.request import Observed, Outcome, RoutableRequest
from router.router import Refusal
from tests.fakes import FakeRouter, route


class Clock:
    now = 10.0

    def __call__(self):
        return self.now


@pytest.fixture
def router():
    return FakeRouter()


@pytest.fixture
async def dispatcher(router):
    dispatcher = Dispatcher(router, clock=Clock())
    yield dispatcher
    dispatcher.stop()


def request(name="r"):
    return RoutableRequest(RequestId(name), "m", np.empty(0, np.uint64), 10, 10, 100.0)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def hold(dispatcher, name="r", outcome=Outcome.FINISHED):
    async with dispatcher.routed(request(name), lambda: Observed(outcome=outcome)) as found:
        return found


async def test_a_route_is_held_for_the_block_and_released_with_what_was_observed(dispatcher, router):
    router.answers = [route("r", "d0")]
    async with dispatcher.routed(request(), lambda: Observed(completion_tokens=3)) as found:
        assert found.decode == "d0"
        assert router.bound == {"r"}
        assert router.released == []
    assert router.released == [("r", Observed(completion_tokens=3))]
    assert dispatcher.num_waiting == 0


async def test_a_failure_in_the_block_releases_once(dispatcher, router):
    router.answers = [route("r", "d0")]
    with pytest.raises(RuntimeError):
        async with dispatcher.routed(request(), Observed):
            raise RuntimeError
    assert len(router.released) == 1


async def test_a_refusal_at_submit_or_later_is_raised(dispatcher, router):
    router.refuses = Rejected("full")
    with pytest.raises(Rejected, match="full"):
        await hold(dispatcher)
    router.refuses = None
    router.answers = [Refusal(RequestId("r"), Rejected("too late"))]
    with pytest.raises(Rejected, match="too late"):
        await hold(dispatcher)
    assert router.released == []
    assert dispatcher.num_waiting == 0


async def test_the_router_is_asked_once_for_all_that_changed_in_a_turn(dispatcher, router):
    for _ in range(5):
        dispatcher.changed()
    await settle()
    assert router.log == ["dispatch"]


async def test_a_waiting_request_is_bound_when_something_changes(dispatcher, router):
    waiting = asyncio.ensure_future(hold(dispatcher))
    await settle()
    assert dispatcher.num_waiting == 1
    router.answers = [route("r", "d1")]
    dispatcher.changed()
    assert (await waiting).decode == "d1"


async def test_the_router_is_asked_at_the_instant_it_named(dispatcher, router):
    router.wakes_at = 10.001
    waiting = asyncio.ensure_future(hold(dispatcher))
    await settle()
    router.wakes_at = None
    router.answers = [route("r", "d1")]
    assert (await asyncio.wait_for(waiting, 5)).decode == "d1"


async def test_a_client_gone_while_waiting_is_withdrawn(dispatcher, router):
    waiting = asyncio.ensure_future(hold(dispatcher))
    await settle()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert router.withdrawn == ["r"]
    assert router.released == []
    assert dispatcher.num_waiting == 0


async def test_a_client_gone_just_after_it_was_bound_is_released(dispatcher, router):
    waiting = asyncio.ensure_future(hold(dispatcher))
    await settle()
    router.answers = [route("r", "d0")]
    dispatcher._dispatch()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert router.released == [("r", Observed(outcome=Outcome.CANCELLED))]
    assert router.bound == set()


async def test_a_client_gone_just_before_it_was_bound_is_released(dispatcher, router):
    waiting = asyncio.ensure_future(hold(dispatcher))
    await settle()
    router.answers = [route("r", "d0")]
    waiting.cancel()
    dispatcher._dispatch()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert router.released == [("r", Observed(outcome=Outcome.CANCELLED))]
    assert router.bound == set()


async def test_a_router_that_raises_fails_those_who_wait_and_nobody_else(dispatcher, router):
    router.raises = ZeroDivisionError("a policy's bug")
    with pytest.raises(ZeroDivisionError):
        await hold(dispatcher)
    assert router.waiting == {}
    router.raises = None
    router.answers = [route("r", "d0")]
    assert (await hold(dispatcher)).decode == "d0"
