import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planes.wire.messages import EngineFacts, HandoverMode, LatencyPrior, RequestId, Role, WorkerId
from router.cost import CostModel, can_hand_over, congestion, decode_cost, judge, local, pair, prefill_cost
from router.latency import LatencyModel, LinkModel
from router.policies.headrace import Headrace
from router.policy import FleetView, WorkerView
from router.request import RoutableRequest
from tests.fakes import candidate

FACTS = EngineFacts(
    block_size=16,
    num_blocks=10_000,
    context_length=100_000,
    max_batch=64,
    max_step_tokens=2048,
    bytes_per_block=1 << 20,
    vocab_size=9,
)


class Links:
    def __init__(self, slow=(), bytes_per_s=4e9):
        self.slow = slow
        self.fast = LinkModel(LatencyPrior(handover_bytes_per_s=bytes_per_s))
        self.crawling = LinkModel(LatencyPrior(handover_bytes_per_s=bytes_per_s / 1000))

    def link(self, prefill, decode):
        return self.crawling if (prefill, decode) in self.slow else self.fast


def worker(name, role, **load):
    fields = {
        "handover": HandoverMode.PULL,
        "cached_tokens": 0,
        "num_running": 0,
        "num_waiting": 0,
        "waiting_prefill_tokens": 0,
        "queue_s": 0.0,
        "kv_tokens": 0,
        "free_blocks": 10_000,
        "utilisation": 0.0,
    }
    fields.update(load)
    return WorkerView(
        worker=WorkerId(name), role=role, facts=FACTS, latency=LatencyModel(FACTS.latency, 2048), **fields
    )


def fleet(*workers, links=None, seed=0):
    prefill = [each for each in workers if each.role.can_prefill]
    decode = [each for each in workers if each.role.can_decode]
    return FleetView(prefill=prefill, decode=decode, links=links or Links(), now=0.0, rng=random.Random(seed))


def request(tokens=4000, expected=100, **fields):
    return RoutableRequest(RequestId("r"), "m", np.empty(0, dtype=np.uint64), tokens, expected, 1e9, **fields)


def choose(*workers, routable=None, links=None, seed=0):
    return Headrace().choose(routable or request(), fleet(*workers, links=links, seed=seed))


BUSY = {"num_running": 20, "kv_tokens": 40_000, "mean_running": 20.0}
FULL = BUSY | {"prefill_utilisation": 0.7}  # it computes prompts enough already


def test_a_long_prompt_is_handed_over_when_many_decode():
    chosen = choose(worker("p", Role.PREFILL), worker("d", Role.DECODE, **BUSY)).chosen
    assert (chosen.prefill, chosen.decode) == ("p", "d")


def test_a_cached_prompt_stays_where_it_decodes():
    chosen = choose(worker("p", Role.PREFILL), worker("d", Role.DECODE, cached_tokens=3984, num_running=1)).chosen
    assert chosen.prefill is None


def test_a_short_prompt_stays_local_when_the_prefill_worker_has_a_queue():
    busy = worker("p", Role.PREFILL, queue_s=3.0)
    chosen = choose(busy, worker("d", Role.DECODE, num_running=4, kv_tokens=4000), routable=request(100)).chosen
    assert chosen.prefill is None


def test_a_queue_outweighs_a_cached_prefix_and_the_other_way_round():
    cached = worker("p1", Role.PREFILL, cached_tokens=3200, queue_s=0.2)
    empty = worker("p2", Role.PREFILL)
    decode = worker("d", Role.DECODE, **BUSY)
    assert choose(cached, empty, decode).chosen.prefill == "p1"
    assert choose(replace(cached, queue_s=2.0), empty, decode).chosen.prefill == "p2"


def test_congestion_makes_cached_prefixes_count_for_more():
    cached = worker("p1", Role.PREFILL, cached_tokens=2000, queue_s=0.4)
    empty = worker("p2", Role.PREFILL)
    decode = worker("d", Role.DECODE, **FULL)
    assert choose(cached, empty, decode).chosen.prefill == "p2"
    cached, empty = replace(cached, prefill_utilisation=0.9), replace(empty, prefill_utilisation=0.9)
    assert choose(cached, empty, decode).chosen.prefill == "p1"


def test_the_decode_workers_own_blocks_reduce_what_must_move():
    links = Links(bytes_per_s=1e8)
    d1, d2 = worker("d1", Role.DECODE, **FULL), worker("d2", Role.DECODE, cached_tokens=2000, **FULL)
    chosen = choose(worker("p", Role.PREFILL), d1, d2, links=links, routable=request(4000)).chosen
    assert chosen.decode == "d2"
    assert chosen.handover_s == pytest.approx(0.005 + 125 * (1 << 20) / 1e8)


def test_a_slow_link_is_avoided():
    links = Links(slow={("p1", "d1"), ("p1", "d2")})
    workers = [worker("p1", Role.PREFILL), worker("p2", Role.PREFILL, queue_s=0.01)]
    workers += [worker("d1", Role.DECODE, **BUSY), worker("d2", Role.DECODE, **BUSY)]
    assert choose(*workers, links=links).chosen.prefill == "p2"


def test_workers_that_hand_over_differently_are_not_paired():
    pull = worker("p", Role.PREFILL, handover=HandoverMode.PULL)
    push = worker("d", Role.DECODE, handover=HandoverMode.PUSH, **BUSY)
    assert choose(pull, push).chosen.prefill is None
    assert choose(replace(pull, handover=None), replace(push, handover=None)).chosen.prefill is None


def test_one_worker_that_does_both_serves_alone():
    chosen = choose(worker("b", Role.BOTH)).chosen
    assert (chosen.prefill, chosen.decode) == (None, "b")


def test_a_request_that_must_stay_local_does():
    workers = worker("p", Role.PREFILL), worker("d", Role.DECODE, **BUSY)
    assert choose(*workers, routable=request(is_local_only=True)).chosen.prefill is None


def test_a_busy_worker_holds_the_request_and_says_until_when():
    choice = choose(worker("p", Role.PREFILL, queue_s=0.5), worker("d", Role.DECODE, **BUSY))
    assert choice.is_held
    assert "p has 0.50 s" in choice.held_because
    assert 0 < choice.max_backlog_s < 0.1


def test_a_short_prompt_joins_the_next_step_and_a_long_one_waits_for_it_to_end():
    decode = worker("d", Role.DECODE, **BUSY)
    queue_s = 0.1  # with the short one less than sixteen steps cost anyway
    assert not choose(worker("p", Role.PREFILL, queue_s=queue_s), decode, routable=request(400)).is_held
    assert choose(worker("p", Role.PREFILL, queue_s=queue_s), decode, routable=request(1500)).is_held
    assert choose(worker("p", Role.PREFILL, queue_s=queue_s), decode, routable=request(2048)).is_held


def test_where_computing_takes_far_longer_than_a_step_costs_prompts_are_not_brought_together():
    slow = LatencyModel(LatencyPrior(prefill_fixed_s=0.01, prefill_per_token_s=2e-3), 2048)
    busy = replace(worker("d", Role.BOTH, queue_s=0.5), latency=slow)
    assert choose(busy, routable=request(400)).is_held


def test_a_decode_worker_without_room_holds_the_request():
    full = worker("d", Role.DECODE, **BUSY | {"free_blocks": 10})
    choice = choose(worker("p", Role.PREFILL), full, routable=request(expected=10_000))
    assert choice.is_held
    assert choice.held_because == "d has no room to decode"
    other = worker("e", Role.DECODE, **BUSY)
    choice = choose(worker("p", Role.PREFILL), full, other, routable=request(expected=10_000))
    assert (choice.is_held, choice.chosen.decode) == (False, "e")


def test_an_idle_decode_worker_takes_even_what_seems_not_to_fit():
    assert not choose(worker("d", Role.BOTH, free_blocks=1)).is_held


def test_equally_good_workers_share_the_load():
    workers = [worker(f"p{k}", Role.PREFILL) for k in range(4)] + [worker("d", Role.DECODE, **BUSY)]
    chosen = {choose(*workers, seed=seed).chosen.prefill for seed in range(60)}
    assert chosen == {"p0", "p1", "p2", "p3"}


def test_another_rules_choice_is_judged_in_seconds():
    view = fleet(worker("p", Role.PREFILL, queue_s=1.0), worker("d", Role.DECODE, **BUSY))
    bare = candidate("d", "p", total_s=42.0)
    judged = judge(request(), bare, view)
    assert judged.queue_s == 1.0
    assert judged.ttft_s == pytest.approx(1.0 + judged.prefill_s)
    with pytest.raises(ValueError, match="'x'"):
        judge(request(), replace(bare, decode=WorkerId("x")), view)


LOADS = st.fixed_dictionaries(
    {
        "cached_tokens": st.integers(0, 249).map(lambda blocks: blocks * 16),
        "num_running": st.integers(0, 60),
        "queue_s": st.floats(0, 5),
        "kv_tokens": st.integers(0, 100_000),
        "free_blocks": st.integers(0, 10_000),
        "prefill_utilisation": st.floats(0, 1),
        "mean_running": st.floats(0, 60),
        "handover": st.sampled_from([HandoverMode.PULL, HandoverMode.PULL, HandoverMode.PUSH, None]),
    }
)


def every_way(routable, view):
    here = congestion(view)
    ways = [local(prefill_cost(routable, d, here), decode_cost(routable, d)) for d in view.decode]
    return ways + [
        pair(routable, prefill_cost(routable, p, here), decode_cost(routable, d), view.links.link(p.worker, d.worker))
        for p in view.prefill
        for d in view.decode
        if can_hand_over(p, d)
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([Role.PREFILL, Role.DECODE]), LOADS), min_size=1, max_size=7))
def test_nothing_is_cheaper_than_the_choice_where_links_are_equal_and_nothing_stalls(kinds):
    workers = [
        worker(f"w{k}", role, **load | ({"queue_s": 0.0} if role.can_decode else {}))
        for k, (role, load) in enumerate(kinds)
    ]
    if not any(each.role.can_decode for each in workers):
        return
    view = fleet(*workers)
    choice, ways = Headrace().choose(request(), view), every_way(request(), view)
    assert choice.chosen.total_s <= min(way.total_s for way in ways) * 1.0031
    assert choice.chosen in choice.candidates
    assert all(option in ways for option in choice.candidates)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(Role)), LOADS), min_size=1, max_size=7),
    st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6),
)
def test_no_exchange_of_one_worker_improves_the_choice(kinds, slow):
    workers = [worker(f"w{k}", role, **load) for k, (role, load) in enumerate(kinds)]
    if not any(each.role.can_decode for each in workers):
        return
    view = fleet(*workers, links=Links(slow={(f"w{p}", f"w{d}") for p, d in slow}))
    chosen = Headrace().choose(request(), view).chosen
    for way in every_way(request(), view):
        if way.prefill is None or way.prefill == chosen.prefill or way.decode == chosen.decode:
            assert chosen.total_s <= way.total_s * 1.0061


def test_a_kv_cache_may_wait_a_little_for_room_to_decode():
    full = worker("d", Role.DECODE, **BUSY | {"free_blocks": 10})
    assert not choose(worker("p", Role.PREFILL), full).is_held


def test_blocks_that_the_decode_worker_holds_need_no_room():
    assert not decode_cost(
        request(tokens=4000, expected=96), worker("d", Role.DECODE, **BUSY, free_blocks=100)
    ).has_room
    sharing = worker("d", Role.DECODE, **BUSY, free_blocks=100, cached_tokens=3200)
    assert decode_cost(request(tokens=4000, expected=96), sharing).has_room


def test_a_stall_costs_the_more_the_less_a_worker_gets_to_decode():
    def stall(role, share):
        leg = prefill_cost(request(), worker("w", role, num_running=10, prefill_utilisation=share))
        return leg.inflicted_s - leg.prefill_s * share / (1 - share)

    assert stall(Role.BOTH, 0.5) == pytest.approx(2**1.5 * stall(Role.BOTH, 0.0))
    assert stall(Role.DECODE, 0.5) == pytest.approx(4 * stall(Role.DECODE, 0.0))
    assert stall(Role.DECODE, 0.0) > stall(Role.BOTH, 0.0)


def test_pauses_of_a_few_steps_cost_a_decode_workers_streams_less_than_long_ones():
    def stall(max_step_tokens):
        facts = replace(FACTS, max_step_tokens=max_step_tokens)
        busy = replace(worker("w", Role.DECODE, num_running=10, kv_tokens=20_000), facts=facts)
        return prefill_cost(request(), busy).inflicted_s

    assert stall(64) < 0.5 * stall(2048)
    assert stall(4096) == pytest.approx(stall(2048))


def test_a_pause_of_a_step_costs_no_stream_anything_and_steps_that_take_no_time_do_no_harm():
    for fixed_s, is_charged in ((0.05, False), (0.0, True)):
        prior = LatencyPrior(prefill_fixed_s=0.01, prefill_per_token_s=1e-3, step_fixed_s=fixed_s)
        facts = replace(FACTS, max_step_tokens=32, latency=prior)
        latency = LatencyModel(prior, 32)
        busy = replace(worker("w", Role.DECODE, num_running=1), facts=facts, latency=latency)
        inflicted_s = prefill_cost(request(640), busy).inflicted_s
        assert (inflicted_s > 0.01) is is_charged


def test_a_request_that_passes_others_is_charged_for_it_and_never_held():
    facts = replace(FACTS, max_step_tokens=64, is_shortest_first=True)
    idle = replace(worker("d", Role.BOTH, queue_s=2.0), facts=facts)
    passing = replace(idle, num_passed=2, starts_in_s=0.1)
    assert choose(idle, routable=request(60)).is_held
    choice = choose(passing, routable=request(60))
    chosen, leg = choice.chosen, prefill_cost(request(60), passing)
    assert not choice.is_held
    assert (chosen.queue_s, chosen.num_passed) == (0.1, 2)
    assert leg.inflicted_s == pytest.approx(2 * leg.prefill_s)
    assert chosen.decode_s > choose(replace(idle, queue_s=0.0), routable=request(60)).chosen.decode_s


def test_prompts_go_to_a_decode_worker_until_its_streams_become_slow():
    backlog = worker("p", Role.PREFILL, queue_s=3.0, prefill_utilisation=0.8)
    fast = worker("d", Role.DECODE, num_running=4, kv_tokens=8000, mean_running=4.0)
    assert choose(backlog, fast).chosen.prefill is None
    assert choose(backlog, replace(fast, prefill_utilisation=0.7)).chosen.prefill == "p"


def test_an_idle_worker_is_not_passed_over_for_the_streams_it_had():
    idle = worker("idle", Role.BOTH, mean_running=8.0, prefill_utilisation=0.9)
    busy = worker("busy", Role.BOTH, queue_s=5.0, prefill_utilisation=0.9)
    choice = choose(idle, busy)
    assert (choice.chosen.prefill, choice.chosen.decode) == (None, "idle")
    assert not choice.is_held


def test_the_parts_of_every_candidate_add_up():
    choice = choose(worker("p", Role.PREFILL, queue_s=0.2), worker("d", Role.DECODE, **BUSY), worker("b", Role.BOTH))
    assert len(choice.candidates) > 2
    for way in choice.candidates:
        parts = way.queue_s + way.prefill_s + way.handover_s + way.first_step_s + way.decode_s + way.inflicted_s
        assert parts - way.early_token_discount_s == pytest.approx(way.total_s)


def test_the_constants_of_the_price_are_the_policy_s_to_be_given():
    workers = worker("p", Role.PREFILL, queue_s=0.5), worker("d", Role.DECODE, **BUSY)
    assert choose(*workers).chosen.prefill == "p"
    cheap = Headrace(CostModel(stall_decode=0.0)).choose(request(), fleet(*workers)).chosen
    assert cheap.prefill is None
    late = worker("b", Role.BOTH, queue_s=5.0)
    assert choose(late).is_held
    assert not Headrace(CostModel(round_trip_s=60.0)).choose(request(), fleet(late)).is_held
