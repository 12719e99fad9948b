import importlib
import random

import pytest

from router.policies import POLICIES
from router.policies.least_loaded import LeastLoaded
from router.policies.leg_policy import least

PEERS = [path for name, path in POLICIES.items() if name != "headrace"]


def load(path):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)()


def test_ties_are_broken_at_random():
    rng = random.Random(1)
    assert {least([2.0, 1.0, 1.0], rng) for _ in range(50)} == {1, 2}


@pytest.mark.parametrize("path", PEERS)
def test_every_rule_sends_a_prompt_through_both_legs(path, worker, view, request_of):
    fleet = view(worker("p0", "prefill"), worker("p1", "prefill"), worker("d0", "decode"), worker("d1", "decode"))
    choice = load(path).choose(request_of(1600), fleet)
    assert choice.chosen.prefill in {"p0", "p1"}
    assert choice.chosen.decode in {"d0", "d1"}
    assert choice.chosen in choice.candidates
    assert len(choice.candidates) == 3  # the other prefill worker, the other decode worker
    assert not choice.is_held


@pytest.mark.parametrize("path", PEERS)
def test_every_rule_serves_with_one_worker_that_does_both(path, worker, view, request_of):
    choice = load(path).choose(request_of(1600), view(worker("a"), worker("b")))
    assert choice.chosen.prefill is None
    assert choice.chosen.decode in {"a", "b"}
    assert {candidate.decode for candidate in choice.candidates} == {"a", "b"}


@pytest.mark.parametrize("path", PEERS)
def test_every_rule_keeps_a_local_request_on_a_decode_worker(path, worker, view, request_of):
    fleet = view(worker("p", "prefill"), worker("d", "decode", waiting_prefill_tokens=9000, num_running=9))
    choice = load(path).choose(request_of(1600, is_local_only=True), fleet)
    assert (choice.chosen.prefill, choice.chosen.decode) == (None, "d")


@pytest.mark.parametrize("path", PEERS)
def test_every_rule_goes_on_without_prefill_workers(path, worker, view, request_of):
    choice = load(path).choose(request_of(1600), view(worker("d", "decode")))
    assert (choice.chosen.prefill, choice.chosen.decode) == (None, "d")


@pytest.mark.parametrize("path", PEERS)
def test_every_rule_is_deterministic_under_one_seed(path, worker, view, request_of):
    fleet = [worker(f"p{i}", "prefill") for i in range(8)] + [worker(f"d{i}", "decode") for i in range(8)]
    first, second = (load(path).choose(request_of(64), view(*fleet, seed=7)).chosen for _ in range(2))
    assert first == second


def test_in_a_mixed_fleet_the_winner_of_the_prefill_leg_serves_alone_if_it_can(worker, view, request_of):
    busy = worker("p", "prefill", waiting_prefill_tokens=5000)
    choice = LeastLoaded().choose(request_of(160), view(busy, worker("both"), worker("d", "decode")))
    assert (choice.chosen.prefill, choice.chosen.decode) == (None, "both")


def test_in_a_mixed_fleet_a_prefill_worker_may_hand_over_to_a_worker_that_does_both(worker, view, request_of):
    both = worker("both", waiting_prefill_tokens=5000)
    choice = LeastLoaded().choose(request_of(160), view(worker("p", "prefill"), both))
    assert (choice.chosen.prefill, choice.chosen.decode) == ("p", "both")


def test_candidates_carry_the_cached_tokens_of_both_ends(worker, view, request_of):
    fleet = view(worker("p", "prefill", cached_tokens=64), worker("d", "decode", cached_tokens=32))
    chosen = LeastLoaded().choose(request_of(160), fleet).chosen
    assert (chosen.cached_tokens, chosen.decode_cached_tokens) == (64, 32)
