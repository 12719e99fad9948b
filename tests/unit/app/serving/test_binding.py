import asyncio

import numpy as np
import pytest

from app.serving.binding import Dispatcher
from planes.wire.errors import Rejected
from planes.wire.messages import RequestId
from router.request import Observed, RoutableRequest
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


def submit(dispatcher, name="r"):
    """Ask for a route.  Returns: the answers, as they come."""
    answers = []
    dispatcher.submit(request(name), answers.append)
    return answers


async def test_a_route_is_held_until_it_is_released_with_what_was_observed(dispatcher, router):
    router.answers = [route("r", "d0")]
    answers = submit(dispatcher)
    await settle()
    assert [found.decode for found in answers] == ["d0"]
    assert (router.bound, dispatcher.num_waiting) == ({"r"}, 0)
    dispatcher.release(RequestId("r"), Observed(completion_tokens=3))
    assert router.released == [("r", Observed(completion_tokens=3))]


async def test_a_refusal_at_submit_is_raised_and_a_later_one_told(dispatcher, router):
    router.refuses = Rejected("full")
    with pytest.raises(Rejected, match="full"):
        submit(dispatcher)
    router.refuses = None
    error = Rejected("too late")
    router.answers = [Refusal(RequestId("r"), error)]
    answers = submit(dispatcher)
    await settle()
    assert answers == [error]
    assert (router.released, dispatcher.num_waiting) == ([], 0)


async def test_the_router_is_asked_once_for_all_that_changed_in_a_turn(dispatcher, router):
    for _ in range(5):
        dispatcher.changed()
    await settle()
    assert router.log == ["dispatch"]


async def test_a_waiting_request_is_bound_when_something_changes(dispatcher, router):
    answers = submit(dispatcher)
    await settle()
    assert (answers, dispatcher.num_waiting) == ([], 1)
    router.answers = [route("r", "d1")]
    dispatcher.changed()
    await settle()
    assert [found.decode for found in answers] == ["d1"]


async def test_the_router_is_asked_at_the_instant_it_named(dispatcher, router):
    router.wakes_at = 10.001
    found = asyncio.get_running_loop().create_future()
    dispatcher.submit(request(), found.set_result)
    await settle()
    router.wakes_at = None
    router.answers = [route("r", "d1")]
    assert (await asyncio.wait_for(found, 5)).decode == "d1"


async def test_a_question_that_is_taken_back_is_not_answered(dispatcher, router):
    answers = submit(dispatcher)
    await settle()
    dispatcher.withdraw(RequestId("r"))
    router.answers = [route("r", "d0")]
    await settle()
    assert router.withdrawn == ["r"]
    assert (answers, router.bound, router.released, dispatcher.num_waiting) == ([], set(), [], 0)
    dispatcher.withdraw(RequestId("r"))  # nothing is left to take back
    assert router.withdrawn == ["r"]


async def test_a_router_that_raises_leaves_nothing_reserved_and_serves_whoever_comes_next(dispatcher, router):
    bound_first = submit(dispatcher, "bound")
    waiting = submit(dispatcher, "waiting")
    router.bound.add(RequestId("bound"))  # in the very dispatch that raises
    router.raises = ZeroDivisionError("secret")
    await settle()
    for answers in (bound_first, waiting):
        ((error,)) = answers
        assert (error.code, "secret" in str(error)) == ("internal_error", False)
    assert (router.bound, dispatcher.num_waiting) == (set(), 0)
    router.raises = None
    router.answers = [route("r", "d0")]
    answers = submit(dispatcher)
    await settle()
    assert [found.decode for found in answers] == ["d0"]
