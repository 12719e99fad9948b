import numpy as np
import pytest

from loadtest.simulator.records import Gaps


def test_gaps_keep_their_quantiles_to_a_percent():
    gaps = Gaps()
    gaps.add_between([0.0, 0.01, 0.02], 98)  # too few for an array
    gaps.add_between(list(np.arange(21) * 0.02), 2)
    assert gaps.quantile(0.5) == pytest.approx(0.01, rel=0.011)
    assert gaps.quantile(0.99) == pytest.approx(0.02, rel=0.011)
    assert Gaps().quantile(0.5) is None
