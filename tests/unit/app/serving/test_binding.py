import asyncio

import msgspec
import numpy as np
import pytest
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from app.serving.binding import Dispatcher
from planes.wire.errors import Rejected
from planes.wire.messages import RequestId
from router.errors import PolicyFailed
from router.policy import Choice
from router.request import Candidate, Observed, RoutableRequest, Route
from router.router import Refusal, Router
from router.settings import RouterSettings
from tests.fakes import FakeRouter, candidate, registration, route


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
    assert (await asyncio.wait_for(found, 60)).decode == "d1"


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


GOOD, HELD = "good", "held"
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["w0", "w1", "nobody", ""]), st.just(object())
)
ANSWERS = st.one_of(
    st.sampled_from([GOOD, HELD]),
    ODD,
    st.sampled_from([ValueError("x"), SystemExit(1), asyncio.CancelledError(), Rejected("no")]),
    st.builds(
        Choice,
        chosen=st.one_of(st.just(candidate("w0")), ODD),
        candidates=st.one_of(st.just((candidate("w0"),)), ODD, st.lists(ODD, max_size=3).map(tuple)),
        is_held=st.one_of(st.booleans(), ODD),
        held_because=st.one_of(st.text(max_size=3), ODD),
        max_backlog_s=ODD,
    ),
    st.builds(
        lambda fields, is_held: Choice(
            chosen=(option := replace(candidate("w0", "w1"), **fields)), candidates=(option,), is_held=is_held
        ),
        st.dictionaries(st.sampled_from(Candidate.__struct_fields__), ODD, max_size=3),
        st.booleans(),
    ),
)


ODD_WAIT = replace(candidate("w0"), waits_for_room=object())


class Scripted:
    """A policy that answers each request as the test says; GOOD binds it to the first worker, HELD holds it back."""

    name = "scripted"

    def __init__(self, answers):
        self.answers = answers

    def choose(self, request, view):
        answer = self.answers.get(request.request, GOOD)
        if isinstance(answer, BaseException):
            raise answer
        if answer not in (GOOD, HELD):
            return answer
        option = candidate(view.decode[0].worker)
        return Choice(chosen=option, candidates=(option,), is_held=answer == HELD, held_because="later")


@settings(max_examples=150, deadline=None)
@given(st.lists(ANSWERS, min_size=1, max_size=6), st.booleans())
@example(answers=[Choice(chosen=ODD_WAIT, candidates=(ODD_WAIT,))], is_slo_set=False)
def test_whatever_a_policy_answers_reserve_and_release_balance_and_others_are_served(answers, is_slo_set):
    script = {f"r{number}": answer for number, answer in enumerate(answers)}

    async def scenario():
        policy = Scripted(dict(script))
        router = Router(RouterSettings(slo_ttft_s=60.0 if is_slo_set else None), policy, shadow=policy)
        for name in ("w0", "w1"):
            router.worker_up(registration(name))
        dispatcher = Dispatcher(router, clock=Clock())
        answers = {name: [] for name in [*script, "another"]}
        for name, told in answers.items():
            wanted = RoutableRequest(RequestId(name), "sim", np.empty(0, np.uint64), 1000, 10, 1e9)
            dispatcher.submit(wanted, told.append)
        await settle()
        policy.answers.clear()  # it binds whatever it had held back
        router.configure(RouterSettings(), policy)
        open_ = set(answers)
        while open_:  # those that are bound end, and make room for the others
            dispatcher.changed()
            await settle()
            told = [name for name in sorted(open_) if answers[name]]
            assert told, f"nobody answers {sorted(open_)}"
            open_.difference_update(told)
            for name in told:
                (answer,) = answers[name]
                if isinstance(answer, Route):
                    dispatcher.release(RequestId(name), Observed(completion_tokens=3))
                else:
                    assert isinstance(answer, PolicyFailed)
        assert isinstance(answers["another"][0], Route), "one request's policy answer failed another one"
        dispatcher.stop()
        assert (router.stats(now=10.0).bound, router.stats(now=10.0).waiting, dispatcher.num_waiting) == (0, {}, 0)
        for worker in router.workers(now=10.0):
            assert (worker.num_running, worker.num_waiting, worker.kv_tokens, worker.queue_s) == (0, 0, 0, 0.0)
        msgspec.json.encode([router.explain(RequestId(name)) for name in answers])

    with structlog.testing.capture_logs():  # printing hundreds of tracebacks takes minutes
        asyncio.run(scenario())
