from functools import partial

import pytest
from msgspec.structs import replace

from planes.wire.messages import RequestId
from router.decision_log import History, worth_keeping
from router.request import Explanation
from router.timeline import Timeline
from tests.fakes import candidate


def explanation(name):
    return Explanation(RequestId(name), "headrace", 10, 0.0)


def test_history_keeps_the_newest_and_can_shrink():
    history = History(3)
    for name in "abcd":
        history.add(explanation(name))
    assert history.get(RequestId("a")) is None
    assert history.get(RequestId("d")).request == "d"
    history.trim(1)
    assert (len(history), history.get(RequestId("c"))) == (1, None)


def test_an_id_that_comes_again_is_the_newest():
    history = History(2)
    for name in "abac":
        history.add(explanation(name))
    assert history.get(RequestId("b")) is None
    assert history.get(RequestId("a")) is not None


def test_the_attempts_before_stay_with_the_last_one_up_to_a_number():
    history = History(2)
    for held_s in range(12):
        attempt = explanation("a")
        attempt.held_s = held_s
        history.add(attempt)
    last = history.get(RequestId("a"))
    assert (len(history), last.attempt) == (1, 12)
    kept = [(each.attempt, each.held_s, each.earlier) for each in last.earlier]
    assert kept == [(k + 1, k, ()) for k in range(3, 11)]


def test_of_hundreds_of_candidates_the_cheapest_are_kept():
    some = tuple(replace(candidate(f"d{k}"), total_s=float(300 - k)) for k in range(300))
    assert [each.decode for each in worth_keeping(some)] == [f"d{k}" for k in range(299, 267, -1)]
    assert worth_keeping(some[:5]) == some[:5]


def test_those_that_have_ended_are_listed_the_latest_first_to_whom_they_belong():
    history = History(9)
    for number, name in enumerate("abcd"):
        history.add(explanation(name))
        history.get(RequestId(name)).tenant = f"t{number % 2}"
    for name in "dabc"[:3]:
        history.close(RequestId(name), partial(Timeline, RequestId(name), "sim", 0.0, 1.0, "ok"))
    assert [each.request for each in history.ended(None, 9)] == ["d", "b", "a"]
    assert [each.request for each in history.ended(None, 2)] == ["d", "b"]
    assert [each.request for each in history.ended("t1", 9)] == ["d", "b"]
    assert history.ended("nobody", 9) == []


def test_a_timeline_is_made_once_and_only_for_somebody_who_asks():
    made = []

    def timeline(name):
        made.append(name)
        return Timeline(RequestId(name), "sim", 0.0, 1.0, "ok")

    history = History(2)
    for name in "abc":
        history.add(explanation(name))
        history.close(RequestId(name), partial(timeline, name))
    assert made == []
    history.close(RequestId("a"), pytest.fail)
    assert [history.get(RequestId("c")).timeline.request for _ in range(2)] == ["c", "c"]
    assert made == ["c"]
    assert [each.timeline.request for each in history.ended(None, 9)] == ["c", "b"]
    assert made == ["c", "b"]


def test_the_timeline_of_an_id_that_comes_again_stays_with_the_attempt_before():
    history = History(2)
    history.add(explanation("a"))
    history.close(RequestId("a"), partial(Timeline, RequestId("a"), "sim", 0.0, 1.0, "ok"))
    history.add(explanation("a"))
    again = history.get(RequestId("a"))
    assert (again.timeline, again.earlier[0].timeline.code) == (None, "ok")
