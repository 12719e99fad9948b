import pytest

from router.policies.llmd import Llmd


def test_the_score_is_the_weighted_sum_of_prefix_queue_and_free_cache(worker, view, request_of):
    fleet = view(
        worker("a", cached_tokens=80, num_waiting=4, free_blocks=500), worker("b", num_waiting=2, free_blocks=900)
    )
    choice = Llmd().choose(request_of(160), fleet)
    # a: 3 * 0.5 + 2 * 0 + 2 * 0.5 = 2.5; b: 0 + 2 * 1 + 2 * 0.9 = 3.8
    assert [candidate.total_s for candidate in choice.candidates] == pytest.approx([-2.5, -3.8])
    assert choice.chosen.decode == "b"


def test_equal_queues_score_full(worker, view, request_of):
    choice = Llmd().choose(request_of(160), view(worker("a", num_waiting=9), worker("b", num_waiting=9)))
    assert choice.chosen.total_s == pytest.approx(-4.0)


def test_the_decode_half_leaves_the_prefix_out(worker, view, request_of):
    fleet = view(
        worker("p", "prefill"), worker("d0", "decode", cached_tokens=80, num_waiting=1), worker("d1", "decode")
    )
    assert Llmd().choose(request_of(160), fleet).chosen.decode == "d1"


def test_sixteen_uncached_tokens_at_the_decode_worker_are_prefilled_remotely(worker, view, request_of):
    fleet = view(worker("p", "prefill"), worker("d", "decode", cached_tokens=144))
    assert Llmd().choose(request_of(160), fleet).chosen.prefill == "p"
    assert Llmd().choose(request_of(159), fleet).chosen.prefill is None
