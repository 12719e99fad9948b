import gc
import math
import random
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from planes.wire.blocks import pack
from planes.wire.messages import (
    BlocksRemoved,
    BlocksStored,
    EngineFacts,
    HandoverEndpoint,
    HandoverMode,
    KvEvents,
    LatencyPrior,
    LoadReport,
    Registration,
    RequestId,
    Role,
    Snapshot,
    StepSample,
    WorkerId,
    WorkerState,
)
from router.fleet import Fleet
from router.latency import LatencyModel
from router.peers import told_of
from router.request import Observed, RoutableRequest
from router.worker import Reservation
from tests import fakes

FACTS = EngineFacts(
    block_size=10,
    num_blocks=1000,
    context_length=9000,
    max_batch=8,
    max_step_tokens=2000,
    bytes_per_block=100,
    vocab_size=9,
)
P, D = WorkerId("p"), WorkerId("d")


def registration(name, role=Role.BOTH, *, epoch=1, model="m", state=WorkerState.READY, facts=FACTS):
    endpoint = HandoverEndpoint(HandoverMode.PULL, f"{name}{epoch}", "h", 1)
    return Registration(WorkerId(name), epoch, role, model, "h:1", "sim", facts, "", endpoint, state)


def report(name, *, epoch=1, running=0, waiting=0, tokens=0, free=1000, kv=0, state=WorkerState.READY, steps=()):
    return LoadReport(WorkerId(name), epoch, state, running, waiting, tokens, free, kv, 0, 0, 0, list(steps))


def request(name="r", *, blocks=(), tokens=100, expected=20, **fields):
    names = np.array(blocks, dtype=np.uint64)
    return RoutableRequest(RequestId(name), "m", names, tokens, expected, 1e9, **fields)


def candidate(prefill, decode, *, cached=0):
    return fakes.candidate(decode, prefill, cached_tokens=cached)


def alone_s(tokens):
    """Seconds that a worker takes for a prompt that has it to itself."""
    return LatencyModel(FACTS.latency, FACTS.max_step_tokens).prefill_s(tokens, tokens)


def fleet_of(*registrations):
    fleet = Fleet()
    for each in registrations:
        fleet.up(each)
    return fleet


def view(fleet, name, *, now=0.0, routable=None, ahead=None):
    seen = fleet.view(routable or request(), ahead or {}, now, random.Random(0))
    return next(worker for worker in [*seen.prefill, *seen.decode] if worker.worker == name)


def test_dispatches_count_at_once_and_are_gone_after_the_release():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    reservation = fleet.reserve(request(), candidate(P, D), 0.0)
    assert (view(fleet, P).num_waiting, view(fleet, P).waiting_prefill_tokens, view(fleet, P).queue_s) == (
        1,
        100,
        alone_s(100),
    )
    assert (view(fleet, D).num_running, view(fleet, D).kv_tokens, view(fleet, D).free_blocks) == (1, 100, 988)
    fleet.prefilled(reservation, 0.5)
    assert (view(fleet, P, now=0.5).num_waiting, view(fleet, P, now=0.5).queue_s) == (0, 0.0)
    fleet.release(reservation, 20, 1.0)
    assert (view(fleet, D).num_running, view(fleet, D).kv_tokens, view(fleet, D).free_blocks) == (0, 0, 1000)


def test_views_tell_how_many_blocks_a_worker_holds():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    fleet.apply_events(KvEvents(P, 1, 1, [BlocksStored(pack(np.array([1, 2, 3], dtype=np.uint64)))]))
    assert (view(fleet, P).num_cached, view(fleet, D).num_cached) == (3, 0)


def test_a_report_that_counts_a_dispatch_does_not_count_it_twice():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    fleet.reserve(request("old"), candidate(P, D), 0.0)
    fleet.reserve(request("new"), candidate(P, D), 0.99)
    fleet.apply_load(report("p", waiting=1, tokens=100), now=1.0, report_delay_s=0.02)
    assert view(fleet, P, now=1.0).num_waiting == 2
    assert view(fleet, P, now=1.0).waiting_prefill_tokens == 200
    assert view(fleet, P, now=1.0).queue_s == pytest.approx(alone_s(100) - 0.01)  # one is in the step, one is ready
    assert view(fleet, P, now=1.0).shared_tokens == 100
    fleet.apply_load(report("p", waiting=2, tokens=200), now=1.1, report_delay_s=0.02)
    assert view(fleet, P, now=1.1).num_waiting == 2
    assert view(fleet, P, now=1.1).waiting_prefill_tokens == 200


def test_a_decode_leg_is_in_reports_only_once_it_has_arrived():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    reservation = fleet.reserve(request(), candidate(P, D), 0.0)
    fleet.apply_load(report("d"), now=5.0, report_delay_s=0.02)
    assert view(fleet, D).num_running == 1
    fleet.prefilled(reservation, 5.0)
    fleet.apply_load(report("d", running=1, kv=100, free=988), now=5.2, report_delay_s=0.02)
    assert (view(fleet, D).num_running, view(fleet, D).kv_tokens, view(fleet, D).free_blocks) == (1, 100, 988)
    fleet.release(reservation, 20, 6.0)
    assert (view(fleet, D).num_running, view(fleet, D).kv_tokens, view(fleet, D).free_blocks) == (0, 0, 1000)


def test_other_gateways_requests_are_in_the_reports():
    fleet = fleet_of(registration("d"))
    fleet.apply_load(report("d", running=3, waiting=1, tokens=800, kv=500, free=900), now=1.0, report_delay_s=0.02)
    fleet.reserve(request(), candidate(None, D), 1.0)
    seen = view(fleet, D, now=1.0)
    assert (seen.num_running, seen.num_waiting, seen.waiting_prefill_tokens) == (4, 2, 900)
    assert seen.queue_s == pytest.approx(alone_s(800) / 2)  # nobody knows when their step began
    assert (seen.shared_tokens, seen.num_sharing) == (100, 1)


def test_a_dispatch_that_a_report_counts_though_it_is_new_is_not_another_gateways():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    reservation = fleet.reserve(request(), candidate(P, D), 0.99)
    fleet.apply_load(report("p", waiting=1, tokens=100), now=1.0, report_delay_s=0.02)
    assert view(fleet, P, now=1.0).waiting_prefill_tokens == 100
    fleet.prefilled(reservation, 1.01)
    assert (view(fleet, P, now=1.01).waiting_prefill_tokens, view(fleet, P, now=1.01).queue_s) == (0, 0.0)


def test_prompt_work_drains_between_reports():
    fleet = fleet_of(registration("d"))
    fleet.apply_load(report("d", waiting=1, tokens=8000), now=1.0, report_delay_s=0.02)
    first = view(fleet, D, now=1.0).queue_s
    assert view(fleet, D, now=1.4).queue_s == pytest.approx(first - 0.4)
    assert view(fleet, D, now=99.0).queue_s == 0.0


def test_a_worker_that_is_late_is_not_taken_for_idle():
    fleet = fleet_of(registration("d"))
    fleet.reserve(request(), candidate(None, D), 0.0)
    assert view(fleet, D, now=10.0).queue_s == pytest.approx(alone_s(100) / 10)


def test_prompts_that_are_sent_together_share_a_step_and_its_fixed_cost():
    """The first begins at once, alone; the others are ready when it is done, and need one step."""
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    for number in range(5):
        fleet.reserve(request(f"r{number}"), candidate(P, D), 0.0)
    work_s = alone_s(100) - LatencyPrior().prefill_fixed_s
    seen = view(fleet, P)
    assert (seen.queue_s, seen.shared_tokens, seen.num_sharing) == (pytest.approx(alone_s(100)), 400, 4)
    assert seen.shared_s == pytest.approx(4 * work_s)
    full = [fleet.reserve(request(f"s{number}"), candidate(P, D), 0.0) for number in range(16)]
    seen = view(fleet, P)  # 2,000 tokens fill a step
    assert seen.queue_s == pytest.approx(alone_s(100) + LatencyPrior().prefill_fixed_s + 20 * work_s)
    assert (seen.shared_tokens, len(full)) == (0, 16)


def test_a_stream_tells_how_long_it_may_still_stand_still():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    assert view(fleet, D).stall_left_s == math.inf
    reservation = fleet.reserve(request(expected=21, slo_itl_s=0.05), candidate(P, D), 0.0)
    step_s = fleet.workers[D].latency.step_s(1, 0)
    assert view(fleet, D).stall_left_s == pytest.approx(20 * (0.05 - step_s), rel=0.01)
    steps = [StepSample(1000, 500_000, 1, 100, 0.3)]
    fleet.apply_load(report("d", running=1, steps=steps), now=1.0, report_delay_s=0.02)
    assert view(fleet, D).stall_left_s == pytest.approx(20 * (0.05 - step_s) - (0.3 - step_s), rel=0.05)
    steps = [StepSample(1000, 500_000, 1, 100, 0.6)]
    fleet.apply_load(report("d", running=1, steps=steps), now=2.0, report_delay_s=0.02)
    assert view(fleet, D).stall_left_s == math.inf  # it has missed its SLO, and cannot miss it again
    fleet.release(reservation, 21, 3.0)
    assert view(fleet, D).num_streams == 0


def test_a_stall_is_known_before_a_report_tells_of_it():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.BOTH))
    stream = fleet.reserve(request("r", expected=21, slo_itl_s=0.05), candidate(P, D), 0.0)
    fleet.prefilled(stream, 0.0)
    before_s = view(fleet, D).stall_left_s
    prompt = fleet.reserve(request("s", tokens=2000), candidate(None, D), 0.0)
    strained_s = view(fleet, D).stall_left_s
    assert before_s - strained_s == pytest.approx(fleet.workers[D].latency.work_s(2000, 2000), rel=0.1)
    takes_s = fleet.workers[D].backlog_s(0.0)
    assert view(fleet, D, now=takes_s / 2).stall_left_s == pytest.approx(strained_s, rel=0.01)
    fleet.prefilled(prompt, takes_s)
    assert view(fleet, D, now=takes_s).stall_left_s == pytest.approx(strained_s, rel=0.01)
    late = fleet.reserve(request("t", expected=21, slo_itl_s=0.05), candidate(P, D), takes_s)
    fleet.prefilled(late, takes_s)
    fleet.release(stream, 21, takes_s)
    assert view(fleet, D, now=takes_s).stall_left_s == pytest.approx(before_s, rel=0.05)  # it was not there yet


def test_what_stood_still_before_a_stream_began_is_not_taken_off_what_it_may():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    reservation = fleet.reserve(request(expected=21, slo_itl_s=0.05), candidate(P, D), 0.0)
    steps = [StepSample(1000, 500_000, 1, 100, 2.0)]  # another one's, while its prompt is computed
    fleet.apply_load(report("d", running=1, steps=steps), now=3.0, report_delay_s=0.02)
    assert view(fleet, D).stall_left_s == math.inf  # as if it had been there
    fleet.prefilled(reservation, 3.0)
    step_s = fleet.workers[D].latency.step_s(1, 0)
    assert view(fleet, D).stall_left_s == pytest.approx(20 * (0.05 - step_s), rel=0.05)
    steps = [StepSample(1000, 500_000, 1, 100, 0.3)]
    fleet.apply_load(report("d", running=1, steps=steps), now=4.0, report_delay_s=0.02)
    assert view(fleet, D).stall_left_s == pytest.approx(20 * (0.05 - step_s) - (0.3 - step_s), rel=0.05)
    fleet.release(reservation, 21, 5.0)
    assert view(fleet, D).stall_left_s == math.inf


def test_streams_that_ended_with_the_last_step_that_a_report_tells_of_decode_no_more():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    reservation = fleet.reserve(request(expected=21), candidate(P, D), 0.0)
    fleet.release(reservation, 21, 0.99)
    step = StepSample(0, 0, 3, 300, 0.01)
    for running in (0, 2, 3, 4):
        fleet.apply_load(report("d", running=running, steps=[step]), now=1.0, report_delay_s=0.02)
        assert view(fleet, D).num_streams == min(running, 3)


def shortest_first(computing):
    """A worker that computes 64 tokens a step and the shortest prompt first, with one to compute."""
    fleet = fleet_of(registration("d", facts=replace(FACTS, max_step_tokens=64, is_shortest_first=True)))
    fleet.reserve(computing, candidate(None, D), 0.0)
    return fleet


def test_a_prompt_that_would_pass_those_before_it_waits_for_a_step():
    fleet = shortest_first(request("long", tokens=900))
    step_s = fleet.workers[D].latency.prefill_s(64, 64)
    shorter, longer = view(fleet, D, routable=request(tokens=899)), view(fleet, D, routable=request(tokens=900))
    assert (shorter.num_passed, shorter.starts_in_s) == (1, step_s)
    assert longer.num_passed == 0
    assert shorter.queue_s == longer.queue_s > 13 * step_s
    assert view(fleet, D, now=0.26, routable=request(tokens=100)).num_passed == 0  # it is in the step


def test_a_prompt_is_compared_with_what_is_left_of_those_before_it():
    fleet = shortest_first(request("long", tokens=900))
    fleet.apply_load(report("d", tokens=500), now=1.0, report_delay_s=0.02)
    assert view(fleet, D, now=1.0, routable=request(tokens=499)).num_passed == 1
    assert view(fleet, D, now=1.0, routable=request(tokens=500)).num_passed == 0


def test_cached_tokens_make_no_prompt_shorter_for_an_engine_that_does_not_know_of_them_yet():
    fleet = shortest_first(request("first", tokens=900, blocks=range(1, 91)))
    seen = view(fleet, D, routable=request("second", tokens=950, blocks=range(1, 91)))
    assert (seen.cached_tokens, seen.num_passed) == (900, 0)


def test_nobody_is_passed_for_longer_than_it_takes_itself():
    fleet = shortest_first(request("long", tokens=900))
    for number in range(3):
        assert view(fleet, D, routable=request(tokens=100)).num_passed == 1
        short = fleet.reserve(request(f"short-{number}", tokens=400), candidate(None, D), 0.0)
        assert view(fleet, D, routable=request(tokens=400)).num_passed == 0  # not shorter than the short one
        fleet.prefilled(short, 0.0)
    assert view(fleet, D, routable=request(tokens=100)).num_passed == 0


def test_other_gateways_prompts_are_not_passed():
    fleet = shortest_first(request("long", tokens=900))
    step_s = fleet.workers[D].latency.prefill_s(64, 64)
    fleet.apply_load(report("d", waiting=2, tokens=920), now=0.1, report_delay_s=0.02)
    seen = view(fleet, D, now=0.1, routable=request(tokens=100))
    assert seen.num_passed == 1
    assert step_s < seen.starts_in_s < 2 * step_s  # after those 20 tokens
    fleet.apply_load(report("d", waiting=3, tokens=1700), now=0.2, report_delay_s=0.02)
    assert view(fleet, D, now=0.2, routable=request(tokens=100)).num_passed == 0


def test_a_prompt_under_way_counts_as_cached_where_it_is_computed():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    reservation = fleet.reserve(request("first", blocks=range(1, 9)), candidate(P, D), 0.0)
    second = request("second", blocks=[1, 2, 3, 4, 50, 60])
    assert view(fleet, P, routable=second).cached_tokens == 40
    assert view(fleet, D, routable=second).cached_tokens == 0
    fleet.release(reservation, 0, 1.0)
    assert view(fleet, P, routable=second).cached_tokens == 0, "it was never computed"


def test_a_computed_prompt_counts_as_cached_until_its_worker_tells_of_it():
    """Else a client that has its first token, and goes on, finds its prompt computed anew by another worker."""
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    reservation = fleet.reserve(request("first", blocks=range(1, 9)), candidate(P, D), 0.0)
    fleet.prefilled(reservation, 1.0)
    fleet.release(reservation, 1, 1.0)
    second = request("second", blocks=[1, 2, 3, 4, 50, 60])
    assert view(fleet, P, routable=second).cached_tokens == 40
    fleet.apply_events(KvEvents(P, 1, 1, [BlocksStored(pack(np.arange(1, 9, dtype=np.uint64)))]))
    assert view(fleet, P, routable=second).cached_tokens == 40
    fleet.apply_events(KvEvents(P, 1, 2, [BlocksRemoved(pack(np.arange(3, 9, dtype=np.uint64)))]))
    assert view(fleet, P, routable=second).cached_tokens == 20, "what the worker tells is what counts"


def test_what_was_sent_to_a_worker_is_not_expected_of_its_next_start():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    fleet.reserve(request("first", blocks=range(1, 9)), candidate(P, D), 0.0)
    fleet.up(registration("p", Role.PREFILL, epoch=2))
    assert view(fleet, P, routable=request("second", blocks=range(1, 9))).cached_tokens == 0


def test_what_a_worker_computed_after_it_was_given_up_is_not_kept():
    fleet = fleet_of(registration("d"))
    reservation = fleet.reserve(request("first", blocks=range(1, 9)), candidate(None, D), 0.0)
    fleet.down(D)
    fleet.prefilled(reservation, 1.0)
    assert len(fleet._untold) == 0


def test_a_prompt_of_which_all_is_held_or_soon_will_be_is_not_compared_with_later_ones():
    fleet = fleet_of(registration("d"))
    fleet.reserve(request("first", blocks=range(1, 11)), candidate(None, D, cached=80), 0.0)
    fleet.reserve(request("again", blocks=range(1, 11)), candidate(None, D, cached=90), 0.0)
    assert len(fleet._untold) == 1


def test_a_prompt_is_looked_up_once_until_what_workers_hold_has_changed():
    fleet, asked = fleet_of(registration("d")), request("asked", blocks=range(1, 5))

    def store():
        fleet.apply_events(KvEvents(D, 1, 1, [BlocksStored(pack(np.arange(1, 4, dtype=np.uint64)))]))

    def snapshot():
        fleet.index.apply_snapshot(Snapshot(D, 1, 5, pack(np.arange(1, 3, dtype=np.uint64))))

    def bind():
        bound.append(fleet.reserve(request("first", blocks=range(1, 9)), candidate(None, D), 0.0))

    def release():
        fleet.release(bound.pop(), 0, 1.0)

    bound, before = [], fleet.cached_blocks(asked)
    assert fleet.cached_blocks(asked) is before
    for change, depth in ((store, 3), (snapshot, 2), (bind, 4), (release, 2), (lambda: fleet.down(D), None)):
        change()
        found = fleet.cached_blocks(asked)
        assert found is not before
        assert found.get(D) == depth
        before = found
    assert fleet.cached_blocks(request("another", blocks=range(1, 5))) is not before


def test_an_answer_of_one_token_takes_no_seat_where_it_would_be_decoded():
    def load(fleet, name):
        seen = view(fleet, name)
        return seen.num_running, seen.num_waiting, seen.kv_tokens, seen.free_blocks, seen.seat_in_s

    def pair():
        return fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))

    fleet, other = pair(), pair()
    idle = load(fleet, D)
    bound = [fleet.reserve(request(f"r{k}", expected=1), candidate(P, D), 0.0) for k in range(FACTS.max_batch)]
    assert (load(fleet, D), view(fleet, P).num_waiting) == (idle, FACTS.max_batch)
    told = [told_of(each, 0.0) for each in bound]
    assert {(each.prefill, each.decode) for each in told} == {(None, P)}
    peers = [other.reserve_told(each, 0.0) for each in told]
    for each in bound:
        fleet.prefilled(each, 0.5)
    assert (load(fleet, D), load(other, D)) == (idle, idle)
    for each, peer in zip(bound, peers, strict=True):
        fleet.release(each, 1, 0.5)
        other.release(peer, 1, 0.5)
    assert {load(one, name) for one in (fleet, other) for name in (P, D)} == {idle}


def test_an_answer_of_one_token_takes_the_blocks_that_its_prefill_worker_lacks():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE))
    fleet.reserve(request(expected=1), candidate(P, D, cached=90), 0.0)
    assert FACTS.num_blocks - view(fleet, P).free_blocks == 2, "ten of a hundred tokens, and the answer"


@pytest.mark.parametrize(("num_requests", "is_looked_up_once"), [(2, True), (100, True), (10_000, False)])
def test_requests_that_are_asked_about_in_turn_are_looked_up_once_as_far_as_they_are_kept(
    num_requests, is_looked_up_once, monkeypatch
):
    fleet = fleet_of(registration("d"))
    fleet.apply_events(KvEvents(D, 1, 1, [BlocksStored(pack(np.arange(1, 4, dtype=np.uint64)))]))
    asked = [request(f"r{k}", blocks=[*range(1, 1 + k % 4), 50]) for k in range(num_requests)]
    match = Mock(wraps=fleet.index.match)
    monkeypatch.setattr(fleet.index, "match", match)
    for _ in range(2):
        assert [fleet.cached_blocks(each).get(D, 0) for each in asked] == [k % 4 for k in range(num_requests)]
    assert (match.call_count == num_requests) is is_looked_up_once
    assert len(fleet._matched) <= 128


def test_an_id_that_comes_again_with_another_prompt_is_looked_up_anew():
    fleet = fleet_of(registration("d"))
    fleet.apply_events(KvEvents(D, 1, 1, [BlocksStored(pack(np.arange(1, 4, dtype=np.uint64)))]))
    assert [fleet.cached_blocks(request("r", blocks=range(1, n))).get(D) for n in (3, 4)] == [2, 3]


def test_a_fully_cached_prompt_leaves_its_last_token_to_compute():
    fleet = fleet_of(registration("d"))
    fleet.apply_events(KvEvents(D, 1, 1, [BlocksStored(pack(np.arange(1, 11, dtype=np.uint64)))]))
    assert view(fleet, D, routable=request(blocks=range(1, 11), tokens=100)).cached_tokens == 90
    assert view(fleet, D, routable=request(blocks=range(1, 11), tokens=101)).cached_tokens == 100


def test_only_ready_workers_of_the_model_that_are_not_excluded_are_offered():
    fleet = fleet_of(
        registration("a"),
        registration("b", model="other"),
        registration("c", state=WorkerState.DRAINING),
        registration("d"),
        registration("e"),
    )
    fleet.apply_load(report("e", state=WorkerState.DRAINING), now=0.0, report_delay_s=0.02)
    seen = fleet.view(request(excluded=frozenset({D})), {}, 0.0, random.Random(0))
    assert [worker.worker for worker in seen.decode] == ["a"]


@pytest.mark.parametrize(
    ("role", "becoming", "prompts", "answers"),
    [
        (Role.DECODE, Role.PREFILL, False, False),
        (Role.PREFILL, Role.DECODE, False, False),
        (Role.BOTH, Role.PREFILL, True, False),
        (Role.BOTH, Role.DECODE, False, True),
    ],
)
def test_a_worker_that_becomes_another_is_offered_for_what_both_roles_do(role, becoming, prompts, answers):
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE), registration("w", role))
    held = fleet.reserve(request(), candidate(None, "w"), 0.0)
    fleet.up(msgspec.structs.replace(registration("w", role), becoming=becoming))
    seen = fleet.view(request(), {}, 0.0, random.Random(0))
    assert ("w" in {each.worker for each in seen.prefill}) is prompts
    assert ("w" in {each.worker for each in seen.decode}) is answers
    fleet.up(registration("w", becoming))
    seen = fleet.view(request(), {}, 0.0, random.Random(0))
    assert ("w" in {each.worker for each in seen.prefill}) is becoming.can_prefill
    assert ("w" in {each.worker for each in seen.decode}) is becoming.can_decode
    assert fleet.workers[WorkerId("w")].has_reservations, "what was bound before stays bound"
    fleet.release(held, 1, 1.0)


def test_without_a_worker_that_decodes_there_is_no_view():
    fleet = fleet_of(registration("p", Role.PREFILL))
    assert fleet.view(request(), {}, 0.0, random.Random(0)) is None


def test_a_local_request_is_offered_no_prefill_worker():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d"))
    seen = fleet.view(request(is_local_only=True), {}, 0.0, random.Random(0))
    assert (list(seen.prefill), len(seen.decode)) == ([], 1)


def test_a_restarted_worker_starts_empty_and_old_reservations_do_not_touch_it():
    fleet = fleet_of(registration("d"))
    reservation = fleet.reserve(request(), candidate(None, D), 0.0)
    fleet.up(registration("d", epoch=2))
    assert view(fleet, D).num_running == 0
    fleet.release(reservation, 5, 1.0)
    assert (view(fleet, D).num_running, view(fleet, D).free_blocks, view(fleet, D).queue_s) == (0, 1000, 0.0)
    fleet.up(registration("d", epoch=1))
    assert fleet.workers[D].registration.epoch == 2


def test_a_worker_whose_lease_ran_out_comes_back_with_its_reservations():
    fleet = fleet_of(registration("d"))
    reservation = fleet.reserve(request(), candidate(None, D), 0.0)
    fleet.down(D)
    assert fleet.view(request(), {}, 0.0, random.Random(0)) is None
    fleet.up(registration("d"))
    assert view(fleet, D).num_running == 1
    fleet.release(reservation, 5, 1.0)
    assert view(fleet, D).num_running == 0


def test_reports_of_another_epoch_are_ignored():
    fleet = fleet_of(registration("d", epoch=3))
    fleet.apply_load(report("d", epoch=2, running=7), now=0.0, report_delay_s=0.02)
    assert view(fleet, D).num_running == 0


def test_utilisation_follows_the_steps_reported():
    fleet = fleet_of(registration("d"))
    fleet.apply_load(report("d"), now=0.0, report_delay_s=0.02)
    for k in range(1, 1200):
        steps = [StepSample(400, 80_000, 2, 0, 0.06)]
        fleet.apply_load(report("d", running=5, steps=steps), now=k / 10, report_delay_s=0.02)
    seen = view(fleet, D)
    assert seen.utilisation == pytest.approx(0.6, abs=0.08)
    assert seen.prefill_utilisation == pytest.approx(0.5, abs=0.08)  # what decoding takes of a step is not a prompt's
    assert seen.mean_running == pytest.approx(2.0, abs=0.3)


def test_a_step_longer_than_the_pause_between_reports_counts_in_full():
    fleet = fleet_of(registration("d"))
    fleet.apply_load(report("d"), now=0.0, report_delay_s=0.02)
    for k in range(1, 2000):  # for one second it computes, for one it rests
        steps = [StepSample(800, 400_000, 0, 0, 1.0)] if k % 20 == 10 else []
        # An engine that tells what runs at the end of a step has nothing running until then.
        fleet.apply_load(report("d", tokens=800 * (1 <= k % 20 < 10), steps=steps), now=k / 10, report_delay_s=0.02)
    assert view(fleet, D).prefill_utilisation == pytest.approx(0.5, abs=0.05)


def test_a_worker_is_never_busier_than_all_the_time():
    fleet = fleet_of(registration("d"))
    for k in range(100):
        steps = [StepSample(800, 400_000, 0, 0, seconds) for seconds in (100.0, math.inf, math.nan, -1.0)]
        fleet.apply_load(report("d", running=1, steps=steps), now=k / 10, report_delay_s=0.02)
    assert 0.0 <= view(fleet, D).prefill_utilisation <= 1.0
    for k in range(100, 3000):
        fleet.apply_load(report("d"), now=k / 10, report_delay_s=0.02)
    assert view(fleet, D).prefill_utilisation < 0.05


def test_a_worker_remembers_no_stream_that_has_ended_however_long_another_goes_on():
    """Nor while no report comes."""
    fleet = fleet_of(registration("d"))
    fleet.reserve(request("patient", expected=2, slo_itl_s=0.05), candidate(None, D), 0.0)
    for number in range(500):
        reservation = fleet.reserve(request(f"r{number}", expected=1000, slo_itl_s=0.05), candidate(None, D), 0.0)
        fleet.release(reservation, 1000, 0.0)
        assert view(fleet, D).stall_left_s < 1.0
    kept = [each for each in gc.get_referrers(fleet.workers[D]) if type(each) is Reservation]
    assert len(kept) < 250


def test_links_are_learned_per_pair_and_per_sender():
    fleet = fleet_of(registration("p", Role.PREFILL), registration("d", Role.DECODE), registration("e", Role.DECODE))
    reservation = fleet.reserve(request(), candidate(P, D), 0.0)
    for _ in range(100):
        fleet.learn(reservation, Observed(handover_s=2.0, handover_bytes=1000))
    assert fleet.links.link(P, D).handover_s(1000) == pytest.approx(2.0, rel=0.1)
    assert fleet.links.link(P, WorkerId("e")).handover_s(1000) == pytest.approx(2.0, rel=0.1)
    assert fleet.links.link(D, P).handover_s(0) == LatencyPrior().handover_fixed_s
    fleet.down(P)
    assert fleet.links.link(P, D).handover_s(0) == LatencyPrior().handover_fixed_s
    fleet.learn(reservation, Observed(handover_s=2.0, handover_bytes=1000))


def test_whole_prefills_teach_only_where_no_steps_are_reported():
    fleet = fleet_of(registration("d"))
    reservation = fleet.reserve(request(tokens=1000), candidate(None, D), 0.0)
    before = view(fleet, D).latency.prefill_s(1000, 1000)
    fleet.learn(reservation, Observed(prefill_s=4.0, cached_tokens=0))
    after = view(fleet, D).latency.prefill_s(1000, 1000)
    assert after > before
    fleet.apply_load(report("d", steps=[StepSample(0, 0, 1, 1, 0.01)]), now=0.0, report_delay_s=0.02)
    learned = view(fleet, D).latency.prefill_s(1000, 1000)
    fleet.learn(reservation, Observed(prefill_s=40.0, cached_tokens=0))
    assert view(fleet, D).latency.prefill_s(1000, 1000) == learned
    assert math.isfinite(learned)


def test_what_whole_prefills_taught_is_forgotten_when_steps_are_told():
    """Of eight prompts in one step each took as long as all of them."""
    fleet, untaught = fleet_of(registration("d")), fleet_of(registration("d"))
    reservation = fleet.reserve(request(tokens=100), candidate(None, D), 0.0)
    for _ in range(8):
        fleet.learn(reservation, Observed(prefill_s=8 * alone_s(100), cached_tokens=0))
    told = report("d", steps=[StepSample(800, 0, 0, 0, alone_s(800))])
    for each in (fleet, untaught):
        each.apply_load(told, now=0.0, report_delay_s=0.02)
    one, other = (view(each, D).latency.prefill_s(1000, 1000) for each in (fleet, untaught))
    assert one == other


def test_a_request_with_an_adapter_is_for_those_that_have_loaded_it():
    fleet = fleet_of(
        replace(registration("a"), adapters={7: "", 8: "no such directory"}),
        replace(registration("b"), adapters={8: ""}),
        registration("c"),
    )

    def eligible(adapter):
        return {worker.worker for worker in fleet.eligible(request(adapter=adapter))}

    assert (eligible(7), eligible(8), eligible(9), eligible(0)) == ({"a"}, {"b"}, set(), {"a", "b", "c"})
    assert fleet.can_serve(request(adapter=7))
    assert not fleet.can_serve(request(adapter=9))
