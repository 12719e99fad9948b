import pytest

from loadtest.decisions import POLICIES, measure


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("has_slos", [False, True])
def test_decisions_are_made_for_fleets_of_both_kinds_and_take_some_time(policy, has_slos):
    cost = measure(policy, 4, num_decisions=8, has_slos=has_slos)
    assert (cost.policy, cost.num_workers, cost.has_slos) == (policy, 4, has_slos)
    assert cost.cpu_us > 0
