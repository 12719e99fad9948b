import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from loadtest.plan.search import best_split, cheapest, fewest, search_both, search_split
from loadtest.plan.trial import Fleet, Need, Pressure, Trial

IDLE = Pressure(0.1, 0.1, 0.1, 0.1)


def made(fleet, ttft_miss=0.5, itl_miss=0.5):
    return Trial(fleet, 100, 0, 1.0, ttft_miss, itl_miss, ttft_miss, itl_miss, IDLE)


def needing(prefill, decode):
    return Need(prefill=prefill, decode=decode, both=prefill + decode, stay_s=1.0, alone_p99_s=0.1)


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 200))
def test_the_fewest_that_hold_are_found_in_few_trials_wherever_the_search_begins(threshold, guess, most):
    asked = []

    def miss(number):
        assert number not in asked
        asked.append(number)
        return threshold / number

    found = fewest(miss, least=1, guess=guess, most=most)
    assert found == (threshold if threshold <= most else None)
    assert all(1 <= number <= most for number in asked)
    assert len(asked) <= 4 * math.log2(most) + 6


def test_workers_that_do_not_help_are_not_added_for_ever():
    asked = []

    def miss(number):
        asked.append(number)
        return 1.5

    assert fewest(miss, least=1, guess=8, most=1000) is None
    assert len(asked) <= 4
    assert max(asked) <= 24


@pytest.mark.parametrize(("threshold", "guess"), [(42, 41), (46, 40), (38, 41), (44, 40)])
def test_near_the_formula_s_number_few_trials_are_enough(threshold, guess):
    asked = []

    def miss(number):
        asked.append(number)
        return (threshold - 0.5) ** 3 / number**3

    assert fewest(miss, least=1, guess=guess, most=64) == threshold
    assert len(asked) <= 5


def test_fleets_that_miss_by_far_do_not_tell_that_more_workers_are_in_vain():
    """They were not tried to the end: all that is known is twice the SLO."""
    assert fewest(lambda number: 2.05 if number < 30 else 0.9, least=1, guess=8, most=64) == 30


def test_a_split_that_is_far_too_small_is_looked_for_further():
    asked = []

    def trial(fleet):
        asked.append(fleet.num_prefill)
        return replace(made(fleet, ttft_miss=2.01 + 0.01 * fleet.num_prefill), is_cut=True)

    assert best_split(trial, 8, needing(2.0, 6.0)).is_cut
    assert asked == [2, 3, 4, 5]


def test_a_miss_of_the_first_token_moves_workers_to_prefill_and_slow_streams_move_them_back():
    def trial(fleet):
        return made(fleet, ttft_miss=5 / fleet.num_prefill, itl_miss=2 / fleet.num_decode)

    assert best_split(trial, 7, needing(3.0, 4.0)).fleet == Fleet(num_prefill=5, num_decode=2)
    assert best_split(trial, 7, needing(6.0, 1.0)).fleet == Fleet(num_prefill=5, num_decode=2)


def test_a_split_that_gets_worse_is_not_followed():
    asked = []

    def trial(fleet):
        asked.append(fleet.num_prefill)
        return made(fleet, itl_miss=3.0 + 2 / fleet.num_prefill)

    assert best_split(trial, 8, needing(6.0, 2.0)).fleet.num_prefill == 6
    assert asked == [6, 5]


@pytest.mark.parametrize(("prefill", "decode"), [(3.2, 1.1), (0.1, 0.1), (0.4, 7.5), (0.0, 0.0)])
def test_the_fewest_of_both_kinds_hold_and_one_fewer_does_not(prefill, decode):
    tried = {}

    def trial(fleet):
        if fleet.num_both:
            found = made(fleet, ttft_miss=1.4 * (prefill + decode) / fleet.num_both)
        else:
            found = made(fleet, prefill / fleet.num_prefill, decode / fleet.num_decode)
        tried[fleet] = found
        return found

    both = search_both(trial, needing(prefill, decode), 64)
    split = search_split(trial, needing(prefill, decode), 64)
    assert both.num_both == max(1, math.ceil(1.4 * (prefill + decode)))
    assert (split.num_prefill, split.num_decode) == (max(1, math.ceil(prefill)), max(1, math.ceil(decode)))
    assert tried[both].holds
    assert tried[split].holds


def test_a_fleet_of_one_has_no_split():
    assert search_split(made, needing(0.1, 0.1), 1) is None


def test_the_cheapest_has_the_fewest_workers_then_the_most_room():
    trials = [
        made(Fleet(num_both=4), 0.1, 0.1),
        made(Fleet(num_both=3), 0.9, 0.2),
        made(Fleet(num_prefill=2, num_decode=1), 0.6, 0.7),
        made(Fleet(num_both=2), 1.01, 0.2),
    ]
    assert cheapest(trials) is trials[2]
    assert cheapest(trials[3:]) is None
