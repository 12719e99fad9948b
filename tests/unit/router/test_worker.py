"""How a worker looks is remembered while nothing happens there, and never for longer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from planes.wire.messages import HandoverMode, LoadReport, RequestId, Role, StepSample, WorkerId, WorkerState
from router.fleet import Fleet
from router.request import RoutableRequest
from tests.fakes import FACTS, candidate, registration

NAMES = ("p", "d")
ROLES = {"p": Role.PREFILL, "d": Role.DECODE}

events = st.lists(
    st.one_of(
        st.tuples(st.just("bind"), st.sampled_from((1, 2)), st.sampled_from((None, 0.05))),
        st.tuples(st.just("prefilled"), st.integers(0, 3), st.none()),
        st.tuples(st.just("release"), st.integers(0, 3), st.none()),
        st.tuples(st.just("report"), st.sampled_from(NAMES), st.integers(0, 500)),
        st.tuples(st.just("role"), st.sampled_from(NAMES), st.sampled_from(list(Role))),
    ),
    max_size=12,
)


def load(name, tokens):
    steps = [StepSample(duration_s=0.02, prefill_tokens=tokens, prefill_pairs=0, batch=2, kv_tokens=400)]
    return LoadReport(WorkerId(name), 1, WorkerState.READY, 2, tokens > 0, tokens, 900, 400, 0, 0, 0, steps)


def looked_at_anew(worker, now, *, num_cached):
    known, worker._idle_view = worker._idle_view, None
    view = worker.view(0, 100, num_cached, 0.0, now)
    worker._idle_view = known
    return view


@given(events)
def test_a_worker_looks_as_it_would_to_somebody_who_had_never_seen_it(history):
    fleet, now, bound = Fleet(), 1.0, []
    for name in NAMES:
        fleet.up(registration(name, ROLES[name]))
    for number, (kind, first, second) in enumerate(history):
        if kind == "bind":
            blocks = np.array([], dtype=np.uint64)
            request = RoutableRequest(RequestId(f"r{number}"), "sim", blocks, 100, 20, 1e9, slo_itl_s=second)
            chosen = candidate("d", "p" if first == 2 else None)
            bound.append(fleet.reserve(request, chosen, now))
        elif kind == "prefilled" and bound:
            fleet.prefilled(bound[first % len(bound)], now)
        elif kind == "release" and bound:
            fleet.release(bound.pop(first % len(bound)), 20, now)
        elif kind == "report":
            fleet.apply_load(load(first, second), now=now, report_delay_s=0.0)
        elif kind == "role":
            fleet.up(registration(first, second))
        num_cached = number // 4
        for worker in fleet.workers.values():
            assert worker.view(0, 100, num_cached, 0.0, now) == looked_at_anew(worker, now, num_cached=num_cached)
        now += 30.0 if number % 2 else 0.001


def test_a_kv_cache_that_is_pushed_waits_for_seconds_and_one_that_is_pulled_for_as_long_as_it_must():
    fleet = Fleet()
    for mode in HandoverMode:
        fleet.up(registration(mode, Role.PREFILL, mode=mode))
    push, pull = (
        fleet.workers[WorkerId(mode)].view(0, 100, 0, 0.0, 1.0) for mode in (HandoverMode.PUSH, HandoverMode.PULL)
    )
    assert push.keeps_s < 30.0
    assert pull.keeps_s == float("inf")


def decoding(fleet, name, now, expected):
    request = RoutableRequest(RequestId(name), "sim", np.array([], dtype=np.uint64), 100, expected, 1e9)
    bound = fleet.reserve(request, candidate("d", "p"), now)
    fleet.prefilled(bound, now)
    return bound


def test_the_next_place_is_free_when_the_first_of_those_that_decode_ends():
    fleet = Fleet()
    fleet.up(registration("p", Role.PREFILL))
    fleet.up(replace(registration("d", Role.DECODE), facts=replace(FACTS, max_batch=3)))
    worker = fleet.workers[WorkerId("d")]
    decoding(fleet, "a", 0.0, 300)
    decoding(fleet, "b", 0.1, 100)
    assert worker.seat_in_s(0.2, 0) == 0.0
    c = decoding(fleet, "c", 0.2, 200)
    step_s = worker.latency.step_s(3, worker.unseen_kv_tokens)
    ends = [0.1 + 100 * step_s, 0.2 + 200 * step_s, 300 * step_s]
    waits = [worker.seat_in_s(0.3, before) for before in range(4)]
    assert waits == pytest.approx([*(end - 0.3 for end in ends), ends[0] - 0.3 + 200 * step_s])
    d = decoding(fleet, "d", 0.3, 50)
    assert worker.seat_in_s(0.3, 0) == waits[1]  # the first place that is free will be d's
    step_s = worker.latency.step_s(3, worker.unseen_kv_tokens)
    assert worker.seat_in_s(0.81, 0) == pytest.approx(0.1 + 150 * step_s - 0.81)  # and free again after it
    for each in (c, d):
        fleet.release(each, 1, 0.81)
    assert worker.seat_in_s(0.81, 0) == 0.0
    assert worker.seat_in_s(0.81, 1) > 0.0  # the one before takes the last place


def test_nobody_counts_on_a_place_sooner_than_in_a_tenth_of_an_answer():
    fleet = Fleet()
    fleet.up(replace(registration("d", Role.DECODE), facts=replace(FACTS, max_batch=1)))
    fleet.up(registration("p", Role.PREFILL))
    decoding(fleet, "a", 0.0, 100)
    worker = fleet.workers[WorkerId("d")]
    step_s = worker.latency.step_s(1, 100)
    assert worker.seat_in_s(80 * step_s, 0) == pytest.approx(20 * step_s)
    for late in (99 * step_s, 101 * step_s, 1e3):  # it should end soon, is a little late, is very late
        assert worker.seat_in_s(late, 0) == pytest.approx(10 * step_s)
    view = worker.view(0, 100, 0, 0.0, 1e3)
    assert view.seat_in_s == worker.seat_in_s(1e3, 0)
    assert worker.view(0, 100, 0, 0.0, 1e3, 2).seat_in_s > worker.view(0, 100, 0, 0.0, 1e3, 1).seat_in_s


def test_streams_of_other_gateways_are_taken_to_have_begun_evenly_spread():
    fleet = Fleet()
    fleet.up(registration("p", Role.PREFILL))
    fleet.up(replace(registration("d", Role.DECODE), facts=replace(FACTS, max_batch=3)))
    fleet.apply_load(load("d", 0), now=0.0, report_delay_s=0.0)  # two that are not ours
    decoding(fleet, "a", 0.0, 100)
    worker = fleet.workers[WorkerId("d")]
    step_s = worker.latency.step_s(3, worker.kv_tokens + worker.unseen_kv_tokens)
    assert [worker.seat_in_s(0.0, before) for before in range(3)] == pytest.approx([50 * step_s, *[100 * step_s] * 2])


def test_where_all_that_decode_are_another_gateway_s_nobody_knows_when_a_place_comes_free():
    fleet = Fleet()
    fleet.up(replace(registration("d", Role.DECODE), facts=replace(FACTS, max_batch=2)))
    fleet.apply_load(load("d", 0), now=0.0, report_delay_s=0.0)
    assert fleet.workers[WorkerId("d")].seat_in_s(0.0, 0) is None
    assert fleet.workers[WorkerId("d")].view(0, 100, 0, 0.0, 0.0).seat_in_s is None
