"""How a worker looks is remembered while nothing happens there, and never for longer."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.messages import HandoverMode, LoadReport, RequestId, Role, StepSample, WorkerId, WorkerState
from router.fleet import Fleet
from router.request import RoutableRequest
from tests.fakes import candidate, registration

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
