import pytest
from msgspec.structs import replace

from router.request import Observed
from router.stats import Counts
from tests import fakes


def candidate(prefill, decode, queue_s):
    seconds = {"queue_s": queue_s, "prefill_s": 1.0, "handover_s": 0.5, "first_step_s": 0.1, "total_s": 9.0}
    return fakes.candidate(decode, prefill, is_first_early=True, **seconds)


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
