import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.like import LiveFleet, LiveWorker
from loadtest.plan import sample
from loadtest.plan.trial import (
    Bench,
    Fleet,
    Pressure,
    Trial,
    Watch,
    after_warm_up,
    judged,
    need,
    pressure,
)
from loadtest.simulator.records import Ending, Gaps, Record, Result
from loadtest.simulator.scenario import Scenario, engine_facts
from loadtest.slo import Slo
from loadtest.workloads import Session, Turn, Workload, load
from planes.wire.messages import LatencyPrior, Role, WorkerId

FACTS = engine_facts(block_size=512, num_blocks=1000, link_gbps=100)
SLO = Slo(2.0, 0.05)


def record(sent_at, *, ttft_s=1.0, itl_s=0.02, prompt_tokens=1000, completion_tokens=11, **fields):
    first_at = sent_at + ttft_s
    return Record(
        sent_at,
        prompt_tokens,
        completion_tokens,
        Ending.FINISHED,
        first_at=first_at,
        last_at=first_at + itl_s * (completion_tokens - 1),
        **fields,
    )


def scenario(fleet, facts=FACTS):
    return Scenario("headrace", fleet.num_prefill, fleet.num_decode, fleet.num_both, facts)


def of(records, fleet=Fleet(num_both=2)):  # noqa: B008 - frozen
    return judged(Result(records, Gaps(), [], 100.0), fleet, scenario(fleet), SLO)


def test_the_first_fifth_of_the_time_is_not_judged():
    records = [record(float(at), ttft_s=50.0 if at < 20 else 1.0) for at in range(101)]
    assert len(after_warm_up(records)) == 81
    found = of(records)
    assert (found.num_requests, found.ttft_p99_s, found.attainment) == (81, pytest.approx(1.0), 1.0)


def test_p99_of_first_tokens_and_of_mean_gaps_are_held_against_the_slo():
    found = of([record(float(at), ttft_s=1.0 + at / 50, itl_s=0.06) for at in range(101)])
    assert found.ttft_p99_s == pytest.approx(3.0)
    assert (found.ttft_miss, found.itl_miss) == (pytest.approx(1.5), pytest.approx(1.2))
    assert (found.miss, found.holds, found.attainment) == (pytest.approx(1.5), False, 0.0)


def test_a_request_that_was_never_served_counts_as_the_slowest():
    records = [record(float(at)) for at in range(101)]
    for lost in records[-3:]:
        lost.ending, lost.first_at, lost.last_at = Ending.REJECTED, None, None
    found = of(records)
    assert (found.num_unserved, found.ttft_p99_s, found.holds) == (3, math.inf, False)


def test_prompts_press_on_prefill_by_what_was_not_cached():
    fleet = Fleet(num_prefill=2, num_decode=1)
    whole, half = (
        pressure([record(float(at), cached_tokens=cached) for at in range(11)], fleet, scenario(fleet), SLO)
        for cached in (0, 500)
    )
    assert whole.prefill == pytest.approx(11 * (0.125 + 0.01 * 1000 / 2048 + 0.001) / (10 * 2), rel=0.01)
    assert half.prefill == pytest.approx(whole.prefill / 2, rel=0.02)
    assert half.decode == whole.decode
    assert whole.bottleneck == "prefill"


def test_answers_press_on_decode_by_the_batch_that_keeps_the_slo():
    fleet = Fleet(num_prefill=2, num_decode=1)
    records = [record(float(at), prompt_tokens=1, completion_tokens=2001) for at in range(11)]
    loose = pressure(records, fleet, scenario(fleet), SLO)
    tight = pressure(records, fleet, scenario(fleet), Slo(2.0, 0.0085))
    assert loose.bottleneck == tight.bottleneck == "decode"
    assert tight.decode > 5 * loose.decode


def test_memory_is_short_where_answers_were_preempted():
    fleet = Fleet(num_prefill=2, num_decode=1)
    calm = pressure([record(float(at)) for at in range(11)], fleet, scenario(fleet), SLO)
    full = pressure([record(float(at), num_preemptions=1) for at in range(11)], fleet, scenario(fleet), SLO)
    assert (calm.bottleneck, full.bottleneck, full.kv_memory) == ("prefill", "KV memory", 1.0)


def test_a_slow_link_is_what_is_short():
    fleet = Fleet(num_prefill=2, num_decode=1)
    slow = scenario(fleet, engine_facts(block_size=512, num_blocks=1000, link_gbps=0.5))
    found = pressure([record(float(at), handover_blocks=2) for at in range(11)], fleet, slow, SLO)
    assert found.handover == pytest.approx(11 * 2 * 2**26 / (0.5e9 / 8) / 20)
    assert found.bottleneck == "handover link"


def test_a_load_twice_as_fast_needs_twice_the_workers():
    slow, fast = (
        need(Bench(sample.generated(rate, 1000, 100, block_size=512, num_requests=300, seed=1), FACTS, SLO), rate)
        for rate in (2.0, 4.0)
    )
    assert fast.prefill == pytest.approx(2 * slow.prefill, rel=0.1)
    assert fast.decode == pytest.approx(2 * slow.decode, rel=0.1)
    assert fast.alone_p99_s == pytest.approx(slow.alone_p99_s, rel=0.3)


def test_a_fleet_with_more_workers_serves_a_load_better():
    bench = Bench(sample.generated(8.0, 1500, 50, block_size=512, num_requests=150, seed=1), FACTS, SLO)
    few, many = (bench.trial(Fleet(num_both=count), is_whole=True) for count in (1, 4))
    assert many.ttft_p99_s < few.ttft_p99_s
    assert many.pressure.prefill == pytest.approx(few.pressure.prefill / 4, rel=0.01)
    assert (few.holds, many.num_unserved) == (False, 0)


def test_a_fleet_that_surely_takes_twice_the_slo_is_not_tried_to_the_end():
    bench = Bench(sample.generated(8.0, 1500, 50, block_size=512, num_requests=150, seed=1), FACTS, SLO)
    ended = []
    cut = bench.trial(Fleet(num_both=1), lambda count, _: ended.append(count))
    whole = bench.trial(Fleet(num_both=1), is_whole=True)
    assert (cut.is_cut, whole.is_cut, bench.trial(Fleet(num_both=4)).is_cut) == (True, False, False)
    assert max(ended) < 120
    assert 2.0 < cut.miss <= whole.miss
    assert cut.ttft_p99_s <= whole.ttft_p99_s
    assert cut.attainment >= whole.attainment
    assert (cut.num_requests, cut.holds) == (whole.num_requests, False)
    assert cut.distance > (False, 1e9)


def test_sessions_whose_turns_wait_for_answers_are_tried_to_the_end():
    assert Watch.over(load("tools", block_size=512, seed=0), SLO) is None
    assert Watch.over(load("uniform", block_size=512, seed=0), SLO) is not None


arrivals = st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 9), st.integers(1, 5)), min_size=5, max_size=60)


@given(arrivals, st.floats(0, 25))
def test_who_gives_up_is_right_whenever_that_is(drawn, now):
    """Of each request its arrival, its time to first token in seconds, and its tokens, 0.07 s apart."""
    drawn.sort()
    empty = np.array([], dtype=np.uint64)
    turns = [Session(at, (Turn(0.0, 10, tokens, empty),)) for at, _, tokens in drawn]
    whole = [record(at, ttft_s=ttft_s, itl_s=0.07, completion_tokens=tokens) for at, ttft_s, tokens in drawn]
    seen = []
    for each in whole:
        if each.sent_at <= now:
            first_at = each.first_at if each.first_at <= now else None
            last_at = each.last_at if first_at is not None and each.last_at <= now else None
            seen.append(replace(each, first_at=first_at, last_at=last_at))
    if Watch.over(Workload("w", 512, tuple(turns)), SLO).is_hopeless(seen, now):
        assert max(of(whole).ttft_miss, of(whole).itl_miss) > 2.0


def test_workers_that_do_both_are_needed_for_what_prompts_leave_of_the_time():
    bench = Bench(sample.generated(8.0, 4000, 400, block_size=512, num_requests=300, seed=1), FACTS, Slo(2.0, 0.02))
    tight, loose = need(bench, 8.0), need(replace(bench, slo=SLO), 8.0)
    assert 1.5 * tight.prefill < tight.both < 2.2 * tight.prefill
    assert loose.both < tight.both
    assert need(replace(bench, slo=Slo(2.0, 0.001)), 8.0).both >= tight.prefill


def test_the_most_wanted_is_the_bottleneck():
    found = Pressure(0.2, 0.9, 0.1, 0.3)
    assert (found.most, found.bottleneck) == (0.9, "decode")


def test_a_plan_like_a_live_fleet_tries_workers_of_its_speed():
    slow = msgspec.structs.replace(FACTS, latency=LatencyPrior(prefill_per_token_s=1e-3))
    live = LiveFleet("m", [LiveWorker(WorkerId("w"), Role.BOTH, slow, 1)], {})
    bench = Bench(sample.generated(0.1, 1500, 5, block_size=512, num_requests=20, seed=1), slow, SLO, like=live)
    found = bench.trial(Fleet(num_prefill=1, num_decode=1))
    assert found.ttft_p99_s > 1.5


def trial_of(fleet, prefill, decode):
    return Trial(fleet, 100, 0, 1.0, 0.1, 0.01, 0.1, 0.1, Pressure(prefill, decode, 0.1, 0.1))


@pytest.mark.parametrize(
    ("fleet", "prefill", "decode", "load"),
    [
        (Fleet(num_both=4), 0.7, 0.4, 1.1),
        (Fleet(num_both=4), 0.6, 0.3, 0.9),
        (Fleet(num_prefill=3, num_decode=1), 0.5, 1.2, 1.2),
        (Fleet(num_prefill=3, num_decode=1), 1.1, 0.4, 0.925),
        (Fleet(num_prefill=3, num_decode=1), 1.3, 0.4, 1.075),
    ],
)
def test_a_fleet_that_is_asked_for_more_than_it_has_does_not_hold(fleet, prefill, decode, load):
    found = trial_of(fleet, prefill, decode)
    assert found.load == pytest.approx(load)
    assert found.holds == (load <= 1)
