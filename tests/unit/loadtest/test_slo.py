import pytest

from loadtest.slo import Slo, mean_gap_s


@pytest.mark.parametrize(
    ("ttft_s", "gaps_s", "is_held"),
    [(1.0, [], True), (1.1, [], False), (1.0, [0.1, 0.0], True), (1.0, [0.2, 0.2], False)],
)
def test_slos_are_of_the_first_token_and_of_gaps_on_average(ttft_s, gaps_s, is_held):
    assert Slo(1.0, 0.1).is_held(ttft_s, mean_gap_s(gaps_s)) is is_held
