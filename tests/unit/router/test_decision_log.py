import pytest
from msgspec.structs import replace

from planes.wire.messages import RequestId
from router.decision_log import Counts, History, worth_keeping
from router.request import Explanation, Observed
from tests import fakes


def explanation(name):
    return Explanation(RequestId(name), "headrace", 10, 0.0)


def candidate(prefill, decode, queue_s):
    seconds = {"queue_s": queue_s, "prefill_s": 1.0, "handover_s": 0.5, "first_step_s": 0.1, "total_s": 9.0}
    return fakes.candidate(decode, prefill, is_first_early=True, **seconds)


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


def test_a_shadow_counts_where_it_differs_and_by_how_much():
    counts = Counts()
    counts.compare(candidate("p", "d", 2.0), candidate("p", "d", 2.0))
    counts.compare(candidate("p", "d", 2.0), candidate("q", "d", 0.5))
    counts.compare(candidate("p", "d", 2.0), candidate(None, "d", 3.0))
    assert (counts.shadow_decided, counts.shadow_differed) == (3, 2)
    assert counts.shadow_faster_s == pytest.approx(0.5)
    counts.forget_shadow()
    assert (counts.shadow_decided, counts.shadow_faster_s) == (0, 0.0)


def test_the_error_of_predictions_follows_what_was_observed():
    counts = Counts()
    for _ in range(200):
        counts.observe(candidate("p", "d", 1.0), Observed(ttft_s=1.6))
    assert counts.ttft_error_ratio == pytest.approx(0.25, rel=0.01)
    counts.observe(candidate("p", "d", 1.0), Observed())
    assert counts.ttft_error_ratio == pytest.approx(0.25, rel=0.01)


def test_a_first_token_that_does_not_wait_for_the_handover_comes_sooner():
    early = candidate("p", "d", 1.0)
    late = replace(early, is_first_early=False)
    assert early.ttft_s == pytest.approx(2.0)
    assert late.ttft_s == pytest.approx(2.6)


def test_of_hundreds_of_candidates_the_cheapest_are_kept():
    some = tuple(replace(candidate(None, f"d{k}", 0.0), total_s=float(300 - k)) for k in range(300))
    assert [each.decode for each in worth_keeping(some)] == [f"d{k}" for k in range(299, 267, -1)]
    assert worth_keeping(some[:5]) == some[:5]
