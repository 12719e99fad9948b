import math

import pytest

from loadtest import live
from loadtest.client import Sample
from loadtest.plan.trial import Fleet


def test_a_live_request_is_judged_as_a_planned_one():
    told = Sample(sent_at=1.0, first_token_at=1.5, last_token_at=2.5, completion_tokens=11, gaps_s=[0.9, 0.1])
    assert live._ttft_of(told) == 0.5
    assert live._itl_of(told) == pytest.approx(0.1)
    assert live._itl_of(Sample(sent_at=1.0, first_token_at=1.5, last_token_at=1.5, completion_tokens=1)) == 0.0
    assert live._ttft_of(Sample(sent_at=1.0, error="refused")) == math.inf


def test_the_planned_fleet_is_the_one_started():
    flags = live._fleet_flags(Fleet(num_prefill=2, num_decode=1))
    assert flags == ["--engine", "sim", "--prefill", "2", "--decode", "1", "--both", "0"]
