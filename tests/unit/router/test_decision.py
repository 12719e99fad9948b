import asyncio
import random
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec.structs import replace

from planes.wire.messages import RequestId, Role, WorkerId
from router import cost
from router.decision import decide
from router.errors import PolicyFailed
from router.fleet import Fleet
from router.policies.headrace import Headrace
from router.policy import Choice
from router.request import RoutableRequest
from tests.fakes import candidate, registration


@pytest.fixture
def view():
    fleet = Fleet()
    for name, role in {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}.items():
        fleet.up(registration(name, role))
    return fleet.view(request(), {}, 0.0, random.Random(0))


def request(tokens=1000):
    return RoutableRequest(RequestId("r"), "sim", np.empty(0, np.uint64), tokens, 10, 1e9)


def answered(answer, view):
    def choose(_request, _view):
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return decide(SimpleNamespace(choose=choose), "mine", request(), view)


def choice(option, *more, **fields):
    return Choice(chosen=option, candidates=(option, *more), **fields)


GOOD = candidate("d", "p")


def test_what_a_policy_may_answer_is_carried_out_in_our_own_seconds(view):
    decision = answered(choice(GOOD, candidate("b"), is_held=True, held_because="later", max_backlog_s=1), view)
    assert decision.chosen == cost.judge(request(), GOOD, view)
    assert decision.chosen.prefill_s != GOOD.prefill_s
    assert (decision.candidates, decision.kept) == ((GOOD, candidate("b")), (GOOD, candidate("b")))
    assert (decision.is_held, decision.held_because, decision.max_backlog_s) == (True, "later", 1.0)


def test_headrace_s_own_seconds_are_the_router_s(view):
    decision = decide(Headrace(), "headrace", request(), view)
    assert decision.chosen in decision.candidates


def test_a_pair_that_cannot_hand_over_is_served_by_its_decode_worker():
    fleet = Fleet()
    fleet.up(registration("p", Role.PREFILL, mode=None))
    fleet.up(registration("d", Role.DECODE))
    view = fleet.view(request(), {}, 0.0, random.Random(0))
    assert answered(choice(candidate("d", "p", prefill_s=3.0)), view).chosen.prefill is None


class Word(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "d",
        GOOD,
        Choice(chosen=GOOD, candidates=()),
        Choice(chosen=GOOD, candidates=[GOOD]),
        Choice(chosen=None, candidates=(GOOD,)),
        Choice(chosen=GOOD, candidates=(GOOD, None)),
        choice(candidate("nobody")),
        choice(candidate("p")),
        choice(candidate("d", "nobody")),
        choice(candidate("b", "d")),
        choice(GOOD, candidate("nobody")),
        choice(replace(GOOD, decode=["d"])),
        choice(replace(GOOD, decode=Word("d"))),
        choice(replace(GOOD, prefill=Word("p"))),
        choice(GOOD, is_held=1),
        choice(GOOD, held_because=None),
        choice(GOOD, makes_way_because=None),
        choice(GOOD, max_backlog_s=float("nan")),
        choice(GOOD, max_backlog_s=-1.0),
        choice(GOOD, max_backlog_s="0"),
        choice(GOOD, max_backlog_s=1e300),
        *[
            choice(replace(GOOD, **{name: value}))
            for name in (
                "cached_tokens",
                "decode_cached_tokens",
                "queue_s",
                "prefill_s",
                "handover_s",
                "first_step_s",
                "inflicted_s",
                "decode_s",
                "num_passed",
                "early_token_discount_s",
                "shared_s",
            )
            for value in (-1, 1e300, float("nan"), float("inf"), "0", None, np.float64(0.5))
        ],
        *[choice(replace(GOOD, total_s=value)) for value in (-1e300, float("nan"), float("inf"), None, np.float64(1))],
        choice(replace(GOOD, is_first_early=1)),
    ],
    ids=repr,
)
def test_what_cannot_be_used_is_the_policy_s_failure(answer, view):
    with pytest.raises(PolicyFailed, match=r"'mine' raised (TypeError|ValueError)"):
        answered(answer, view)


@pytest.mark.parametrize("raised", [KeyError("x"), SystemExit(3), asyncio.CancelledError(), RecursionError()], ids=repr)
def test_whatever_a_policy_raises_is_its_failure(raised, view):
    with pytest.raises(PolicyFailed, match=type(raised).__name__) as failed:
        answered(raised, view)
    assert failed.value.__cause__ is raised


def test_ctrl_c_is_not_the_policy_s(view):
    with pytest.raises(KeyboardInterrupt):
        answered(KeyboardInterrupt(), view)


def test_what_a_policy_raised_is_not_for_clients(view):
    with pytest.raises(PolicyFailed) as failed:
        answered(ValueError("key sk-4711"), view)
    assert "4711" not in str(failed.value)


def test_a_wrong_number_far_down_the_list_is_found(view):
    many = [candidate("d", "p", total_s=float(number)) for number in range(300)]
    with pytest.raises(PolicyFailed):
        answered(choice(*many, candidate("d", "p", total_s=1e9, prefill_s=float("nan"))), view)


def test_a_policy_cannot_change_the_view(view):
    assert isinstance(view.prefill, tuple)
    assert isinstance(view.decode, tuple)
    with pytest.raises(AttributeError):
        view.decode[0].worker = WorkerId("other")
