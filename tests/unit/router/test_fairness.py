import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.messages import RequestId
from router.fairness import ServiceMeter, even_shares, fairness_of, jain

amounts = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6)), min_size=2, max_size=20)


class Meter:
    """One with windows of 10 s, and requests that name themselves."""

    def __init__(self):
        self.meter = ServiceMeter(window_s=10.0)
        self.count = 0

    def asks(self, tenant, tokens, now, *, model="m", priority=0):
        self.count += 1
        name = RequestId(str(self.count))
        self.meter.asks(name, tenant, tokens, model=model, priority=priority, now=now)
        return name

    def at(self, now):
        return self.meter.fairness(now=now)


def test_even_shares_are_equal_but_nobody_gets_more_than_it_asked_for():
    assert even_shares(90, [10, 1000, 20, 1000]) == [10.0, 30.0, 20.0, 30.0]
    assert even_shares(90, [20, 10]) == [20.0, 10.0]
    assert even_shares(90, [100, 100, 100]) == [30.0, 30.0, 30.0]


def test_the_index_is_jains():
    assert jain([1.0, 1.0, 1.0]) == 1.0
    assert jain([0.0, 3.0, 0.0, 0.0]) == 0.25
    assert jain([1.0, 2.0]) == pytest.approx(0.9)


def test_one_tenant_alone_and_a_time_in_which_nothing_is_served_tell_nothing():
    assert fairness_of([(5, 10)]) is None
    assert fairness_of([(0, 10), (0, 10)]) is None


def test_who_gets_all_that_it_asked_for_is_served_fairly_however_little_that_is():
    assert fairness_of([(1000, 50_000), (10, 10), (1000, 2000)]) == (1.0, 0.0)


def test_who_waits_while_another_is_served_lacks_its_even_share():
    index, lack = fairness_of([(80_000, 500_000), (0, 4000)])
    assert index == pytest.approx(0.5)
    assert lack == 4000.0


@given(amounts)
def test_the_index_is_between_one_over_n_and_one_and_even_shares_give_one(tenants):
    tenants = [(min(got, asked), asked) for got, asked in tenants]
    found = fairness_of(tenants)
    total = sum(got for got, _ in tenants)
    if found is not None:
        index, lack = found
        assert 1 / len(tenants) - 1e-9 <= index <= 1 + 1e-9
        assert 0 <= lack <= max(asked for _, asked in tenants)
        fair = even_shares(total, [asked for _, asked in tenants])
        assert math.fsum(fair) == pytest.approx(total)
        assert jain([got / want for got, want in zip(fair, fair, strict=True)]) == pytest.approx(1.0)


def test_a_flood_that_is_served_first_is_told_from_one_that_is_not():
    def served(order):
        meter = Meter()
        loud = [meter.asks("loud", 1000, 0.0) for _ in range(100)]
        quiet = [meter.asks("quiet", 1000, 1.0) for _ in range(4)]
        for number, request in enumerate(order(loud, quiet)):
            meter.meter.served(request, now=1.5 + number)  # 20 s are enough for 20 of them
            if number == 18:
                return meter.at(20.5)
        raise AssertionError

    first_come = served(lambda loud, quiet: loud + quiet)
    alternately = served(lambda loud, quiet: [*itertools.chain(*zip(loud, quiet, strict=False)), *loud[4:]])
    assert (first_come.index, first_come.shortfall_tokens) == (pytest.approx(0.5), 4000.0)
    assert alternately.index == 1.0
    assert (first_come.num_windows, first_come.mean_index) == (1, first_come.index)
    assert (alternately.num_windows, alternately.mean_index) == (1, 1.0)


def test_what_came_in_a_window_and_still_waits_at_its_end_counts_from_the_next_on():
    meter = Meter()
    meter.meter.served(meter.asks("a", 1000, 0.0), now=5.0)
    meter.asks("b", 1000, 9.9)
    assert meter.at(10.0).num_windows == 0
    for _ in range(10):
        meter.meter.served(meter.asks("a", 1000, 11.0), now=11.0)
    assert meter.at(20.0).index == pytest.approx(0.5)


def test_models_and_classes_do_not_compete():
    meter = Meter()
    meter.asks("b", 1000, 0.0, model="other")
    meter.asks("c", 1000, 0.0, priority=1)
    for second in range(20):
        meter.meter.served(meter.asks("a", 1000, 1.0 + second), now=1.5 + second)
    assert (meter.at(30.0).num_windows, meter.at(30.0).index) == (0, 1.0)


def test_the_worst_of_all_models_is_told():
    meter = Meter()
    meter.asks("b", 1000, 1.0, model="uneven")
    for second in range(20):
        for tenant, model in (("a", "even"), ("b", "even"), ("a", "uneven")):
            request = meter.asks(tenant, 1000, 1.5 + second, model=model)
            meter.meter.served(request, now=1.5 + second)
    assert meter.at(21.0).index == pytest.approx(0.5)


def test_who_gives_up_lacks_nothing_any_more():
    meter = Meter()
    lost = meter.asks("b", 1000, 0.0)
    for second in range(16):
        meter.meter.served(meter.asks("a", 1000, 1.0 + second), now=1.5 + second)
    meter.meter.gave_up(lost, now=18.0)
    meter.meter.gave_up(lost, now=18.0)
    meter.meter.served(lost, now=18.0)
    assert (meter.at(21.9).index, meter.at(21.9).num_windows) == (1.0, 0)


def test_quiet_times_are_even_and_what_has_ended_is_forgotten():
    meter = Meter()
    loud = [meter.asks("a", 1000, 0.0) for _ in range(9)]
    quiet = meter.asks("b", 1000, 0.0)
    assert meter.at(10.0).num_windows == 0
    for request in loud:
        meter.meter.served(request, now=12.0)
    unfair = meter.at(20.0)
    meter.meter.served(quiet, now=25.0)
    later = meter.at(1000.0)
    assert (unfair.index, unfair.num_windows) == (pytest.approx(0.5), 1)
    assert (later.index, later.num_windows, later.mean_index) == (1.0, 1, pytest.approx(0.5))
    assert meter.meter._groups == {}
    assert meter.meter._asked == {}
