from collections import Counter

import pytest

from router.policies.llmd_predicted import LlmdPredicted


def share_of(name, policy, request, *workers, view, side="decode"):
    choices = [policy.choose(request, view(*workers, seed=seed)).chosen for seed in range(400)]
    return Counter(getattr(chosen, side) for chosen in choices)[name] / 400


def test_the_cost_weighs_the_scaled_predictions(worker, view, request_of):
    fleet = view(worker("a", queue_s=1.0), worker("b", queue_s=0.5), worker("c", num_running=20))
    choice = LlmdPredicted().choose(request_of(160), fleet)
    # ttft: 1, a half and none of the spread; tpot: only c's batch is larger
    assert [candidate.total_s for candidate in choice.candidates] == pytest.approx([0.8, 0.4, 0.2])


def test_the_best_is_picked_a_hundred_times_as_often_as_the_worst(worker, view, request_of):
    slow = worker("slow", queue_s=3.0, num_running=20)
    assert share_of("fast", LlmdPredicted(), request_of(160), worker("fast"), slow, view=view) > 0.97


def test_equal_workers_share(worker, view, request_of):
    share = share_of("a", LlmdPredicted(), request_of(160), worker("a"), worker("b"), view=view)
    assert share == pytest.approx(0.5, abs=0.1)


def test_whoever_holds_most_of_the_prompt_is_preferred_up_to_a_penalty(worker, view, request_of):
    policy, idle = LlmdPredicted(explore=0.0), worker("idle")
    warm = worker("warm", cached_tokens=144, queue_s=4.0, num_running=20)
    assert share_of("warm", policy, request_of(160), warm, idle, view=view) == 1.0
    too_late = worker("warm", cached_tokens=144, queue_s=6.0, num_running=20)
    assert share_of("warm", policy, request_of(160), too_late, idle, view=view) < 0.05
    half = worker("warm", cached_tokens=80, queue_s=4.0, num_running=20)
    assert share_of("warm", policy, request_of(160), half, idle, view=view) < 0.05


def test_some_requests_explore(worker, view, request_of):
    warm = worker("warm", cached_tokens=144, queue_s=4.0, num_running=20)
    explores = LlmdPredicted(explore=1.0)
    assert share_of("warm", explores, request_of(160), warm, worker("idle"), view=view) < 0.05


def test_a_decode_worker_is_judged_as_if_it_computed_the_prompt(worker, view, request_of):
    fleet = (worker("p", "prefill"), worker("d0", "decode", queue_s=2.0), worker("d1", "decode", num_running=10))
    assert share_of("d1", LlmdPredicted(), request_of(160), *fleet, view=view) > 0.6


def test_sixteen_uncached_tokens_at_the_decode_worker_are_prefilled_remotely(worker, view, request_of):
    fleet = view(worker("p", "prefill"), worker("d", "decode", cached_tokens=144))
    assert LlmdPredicted().choose(request_of(160), fleet).chosen.prefill == "p"
    assert LlmdPredicted().choose(request_of(159), fleet).chosen.prefill is None
