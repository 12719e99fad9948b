import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planes.wire.messages import EngineFacts, HandoverMode, LatencyPrior, RequestId, Role, WorkerId
from router.cost import can_hand_over, decode_cost, judge, local, pair, prefill_cost
from router.latency import LatencyModel, LinkModel
from router.policies.headrace import Headrace
from router.policy import FleetView, Hopeful, WorkerView
from router.prices import MEASURED, CostModel, congestion, stall_price
from router.request import RoutableRequest, Sacrifice
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
    fields.setdefault("num_streams", fields["num_running"])
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


def both_ways(*workers, routable):
    """What is chosen, and what is when no pair may be left out: a worker that nobody would choose sees to it."""
    last = worker("unfit", Role.PREFILL, queue_s=1e6)
    return choose(*workers, routable=routable).chosen, choose(*workers, last, routable=routable).chosen


loads = st.fixed_dictionaries(
    {
        "queue_s": st.sampled_from((0.0, 0.005, 0.5)),
        "cached_tokens": st.sampled_from((0, 48)),
        "num_streams": st.sampled_from((0, 1, 30)),
        "kv_tokens": st.sampled_from((0, 5000, 200_000)),
        "without_room": st.sampled_from((0, 0, 2)),
        "free_blocks": st.sampled_from((10_000, 1)),
        "mean_running": st.sampled_from((0.0, 30.0)),
    }
)


@given(st.lists(loads, min_size=2, max_size=4), st.sampled_from((60, 1000)), st.sampled_from((1, 100)))
def test_a_pair_that_is_not_weighed_would_not_have_been_chosen(states, tokens, expected):
    workers = [worker(f"b{number}", Role.BOTH, **state) for number, state in enumerate(states)]
    short, full = both_ways(*workers, routable=request(tokens, expected))
    assert short.gives_up is full.gives_up
    assert short.total_s <= full.total_s * MEASURED.near**2


def test_a_request_that_must_stay_local_does():
    workers = worker("p", Role.PREFILL), worker("d", Role.DECODE, **BUSY)
    assert choose(*workers, routable=request(is_local_only=True)).chosen.prefill is None


def test_a_busy_worker_holds_the_request_and_says_until_when():
    choice = choose(worker("p", Role.PREFILL, queue_s=0.5), worker("d", Role.DECODE, **BUSY))
    assert choice.is_held
    assert "p has 0.50 s" in choice.held_because
    assert 0 < choice.max_backlog_s < 0.1


def test_of_many_that_share_a_step_the_first_are_sent_so_much_earlier():
    view = fleet(worker("b", Role.BOTH, queue_s=0.03))
    assert Headrace().choose(request(60), view).is_held
    many = replace(view, num_waiting=50)  # 34 of them fit into a step, and it takes 1 ms to send one
    assert not Headrace().choose(request(60), many).is_held
    assert Headrace().choose(request(1500), many).is_held  # one of these does


def test_a_prompt_joins_a_step_unless_those_in_it_would_lose_more_than_a_step_of_its_own_costs():
    decode = worker("d", Role.DECODE, **BUSY)
    next_step = worker("p", Role.PREFILL, queue_s=0.005, shared_tokens=300, shared_s=0.0375, num_sharing=1)
    assert not choose(next_step, decode, routable=request(60)).is_held  # 7.5 ms more, where a step costs 10
    choice = choose(next_step, decode, routable=request(1500))
    assert choice.is_held
    assert "1 prompts would wait 0.19 s longer" in choice.held_because
    view = replace(fleet(next_step, decode), num_waiting=40)  # a step less for each of 40
    assert not Headrace().choose(request(1500), view).is_held


def test_where_computing_takes_far_longer_than_a_step_costs_prompts_are_not_brought_together():
    slow = LatencyModel(LatencyPrior(prefill_fixed_s=0.01, prefill_per_token_s=2e-3), 2048)
    busy = replace(worker("d", Role.BOTH, queue_s=0.5), latency=slow)
    assert choose(busy, routable=request(400)).is_held


def test_a_decode_worker_without_room_holds_a_request_whose_first_token_is_to_come_from_it():
    wanted = request(expected=10_000, is_first_token_exact=False)
    full = worker("d", Role.DECODE, **BUSY | {"free_blocks": 10})
    choice = choose(worker("p", Role.PREFILL), full, routable=wanted)
    assert choice.is_held
    assert choice.held_because == "d has no room for it"
    assert not choose(worker("p", Role.PREFILL), full, routable=request(expected=10_000)).is_held, "it comes early"
    other = worker("e", Role.DECODE, **BUSY)
    choice = choose(worker("p", Role.PREFILL), full, other, routable=wanted)
    assert (choice.is_held, choice.chosen.decode) == (False, "e")


def test_an_idle_decode_worker_takes_even_what_seems_not_to_fit():
    assert not choose(worker("d", Role.BOTH, free_blocks=1)).is_held


def test_equally_good_workers_share_the_load():
    workers = [worker(f"p{k}", Role.PREFILL) for k in range(4)] + [worker("d", Role.DECODE, **BUSY)]
    chosen = {choose(*workers, seed=seed).chosen.prefill for seed in range(60)}
    assert chosen == {"p0", "p1", "p2", "p3"}


def test_workers_that_do_both_hand_over_to_each_other_only_where_that_gains_something():
    """Each is as good as any pair of them, in long answers to within a thousandth."""
    equal = [worker(f"b{k}", Role.BOTH, **BUSY) for k in range(3)]
    for seed in range(30):
        assert choose(*equal, routable=request(200, expected=5000), seed=seed).chosen.prefill is None


def test_another_rules_choice_is_judged_in_seconds():
    view = fleet(worker("p", Role.PREFILL, queue_s=1.0), worker("d", Role.DECODE, **BUSY))
    bare = candidate("d", "p", total_s=42.0)
    judged = judge(request(), bare, view)
    assert judged.queue_s == 1.0
    assert judged.ttft_s == pytest.approx(1.0 + judged.prefill_s)
    with pytest.raises(ValueError, match="'x'"):
        judge(request(), replace(bare, decode=WorkerId("x")), view)


def test_a_pair_as_good_as_another_is_not_taken_where_a_better_one_lies_beside_it():
    """The first prefill worker, from which the search begins, reaches the better decode worker by a slow link alone."""
    workers = [worker(f"p{k}", Role.PREFILL) for k in range(6)]
    workers += [
        worker("d0", Role.DECODE, num_running=40, kv_tokens=80_000, mean_running=40.0),
        worker("d1", Role.DECODE),
    ]
    links = Links(slow={("p0", "d1")})
    for seed in range(20):
        chosen = choose(*workers, links=links, seed=seed).chosen
        assert chosen.decode == "d1"


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
    ways = [local(routable, prefill_cost(routable, d, here), decode_cost(routable, d)) for d in view.decode]
    ways += [
        pair(routable, prefill_cost(routable, p, here), decode_cost(routable, d), view.links.link(p.worker, d.worker))
        for p in view.prefill
        for d in view.decode
        if can_hand_over(p, d)
    ]
    return [way.candidate() for way in ways]


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
    least = min(ways, key=lambda way: way.order_s)
    assert choice.chosen.gives_up == least.gives_up
    assert choice.chosen.total_s <= least.total_s * 1.0031
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
            assert chosen.order_s <= way.order_s + 0.0061 * way.total_s


def test_a_kv_cache_may_wait_a_little_for_room_to_decode():
    full = worker("d", Role.DECODE, **BUSY | {"free_blocks": 10})
    assert not choose(worker("p", Role.PREFILL), full).is_held


def test_blocks_that_the_decode_worker_holds_need_no_room():
    assert not decode_cost(
        request(tokens=4000, expected=96), worker("d", Role.DECODE, **BUSY, free_blocks=100)
    ).has_room
    sharing = worker("d", Role.DECODE, **BUSY, free_blocks=100, cached_tokens=3200)
    assert decode_cost(request(tokens=4000, expected=96), sharing).has_room


def test_a_stall_costs_the_more_the_less_a_stream_has_left_and_nothing_more_once_its_slo_is_lost():
    streams = worker("d", Role.DECODE, num_running=10, mean_expected=50.0)
    wanted = request(slo_ttft_s=5.0, slo_itl_s=0.05)

    def price(step_s, busy=0.0, worker=streams):
        return stall_price(wanted, worker, step_s, busy, MEASURED)

    per_token_s = 5.0 / (0.05 * 50)
    assert price(0.01) == pytest.approx(per_token_s * 0.2 / 0.8)
    assert price(0.01, busy=0.5) == pytest.approx(per_token_s * 0.4 / 0.6)
    assert price(0.01, worker=replace(streams, mean_expected=500.0)) == pytest.approx(price(0.01) / 10)
    assert price(0.06) == price(0.09) == pytest.approx(per_token_s)


def test_without_an_slo_a_stall_is_measured_in_steps():
    streams = worker("d", Role.DECODE, num_running=10, mean_expected=50.0)
    fast, slow = (stall_price(request(), streams, step_s, 0.5, MEASURED) for step_s in (0.001, 0.1))
    assert fast == pytest.approx(slow) == pytest.approx(100 / 50 * 0.5 / 0.5)


def test_without_an_slo_a_second_of_stall_costs_a_second_at_least():
    """By so much the answer ends later, however long it is."""
    long = worker("d", Role.DECODE, num_running=10, mean_expected=2000.0)
    for itl_s, costs_one in ((None, True), (0.05, False)):
        assert (stall_price(request(slo_itl_s=itl_s), long, 0.01, 0.0, MEASURED) == 1.0) is costs_one


@pytest.mark.parametrize(("max_step_tokens", "is_pause"), [(64, False), (2048, True)])
def test_without_an_slo_streams_on_a_decode_worker_never_stand_still_for_long(max_step_tokens, is_pause):
    facts = replace(FACTS, max_step_tokens=max_step_tokens)
    decode = replace(worker("d", Role.DECODE, num_running=1), facts=facts)
    assert prefill_cost(request(), decode).pauses is is_pause
    assert not prefill_cost(request(), replace(decode, role=Role.BOTH)).pauses
    assert not prefill_cost(request(), replace(decode, num_streams=0)).pauses
    choice = choose(worker("p", Role.PREFILL, queue_s=60.0), decode)
    assert (choice.chosen.prefill, choice.is_held) == (("p", True) if is_pause else (None, False))
    alone = choose(decode).chosen
    assert alone.gives_up == (Sacrifice.ITL if is_pause else Sacrifice.NOTHING)


def test_a_prompt_costs_streams_its_work_and_what_its_steps_take_longer_than_theirs():
    """They would have had a step at that time, too."""
    latency = LatencyModel(LatencyPrior(prefill_fixed_s=0.01, prefill_per_token_s=1e-3, step_fixed_s=0.01), 2048)
    busy = replace(worker("b", Role.BOTH, num_running=1, mean_expected=100.0), latency=latency)
    price = stall_price(request(640), busy, latency.step_s(1, 0), 0.0, MEASURED)
    work_s = latency.work_s(640, 640)
    assert prefill_cost(request(640), busy).inflicted_s == pytest.approx(work_s * price)
    sharing = replace(busy, shared_tokens=100, shared_s=0.1, num_sharing=1)
    assert prefill_cost(request(640), sharing).inflicted_s == pytest.approx(work_s * (price + 1))


def test_prompts_that_share_a_step_pay_for_it_once():
    empty = worker("p", Role.PREFILL)
    sharing = replace(empty, shared_tokens=2000, shared_s=0.25, num_sharing=4)
    alone, joining, over = (prefill_cost(request(n), sharing) for n in (2048, 48, 49))
    fixed_s = LatencyPrior().prefill_fixed_s
    work_s = empty.latency.work_s
    assert joining.prefill_s == pytest.approx(0.25 + fixed_s + work_s(48, 48))
    assert over.prefill_s == pytest.approx(0.25 + 2 * fixed_s + work_s(49, 49))
    assert alone.work_s == pytest.approx(fixed_s + work_s(2048, 2048))
    assert joining.work_s == pytest.approx(fixed_s * 48 / 2048 + work_s(48, 48))


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


SLO = {"slo_ttft_s": 5.0, "slo_itl_s": 0.05}


def test_what_a_way_gives_up_goes_before_its_seconds():
    """First the time between tokens of every stream, then its own first token, then that nobody stands still long."""
    wanted = request(expected=300, **SLO)
    backlog = worker("p", Role.PREFILL, queue_s=6.0)
    early = replace(backlog, queue_s=3.0)
    streams = worker("d", Role.DECODE, num_running=4, kv_tokens=8000, mean_expected=300.0, stall_left_s=5.0)
    assert choose(early, streams, routable=wanted).chosen.prefill == "p"  # in time, and nobody stands still
    chosen = choose(backlog, streams, routable=wanted).chosen
    assert (chosen.prefill, chosen.gives_up) == (None, Sacrifice.PAUSE)
    strained = replace(streams, stall_left_s=0.1)
    chosen = choose(backlog, strained, routable=wanted).chosen
    assert (chosen.prefill, chosen.gives_up) == ("p", Sacrifice.TTFT)
    assert choose(strained, routable=wanted).chosen.gives_up == Sacrifice.ITL_AND_PAUSE


@pytest.mark.parametrize("slo_ttft_s", [20.0, 86_400.0])
def test_no_seconds_outweigh_what_is_given_up_however_late_a_first_token_may_be(slo_ttft_s):
    wanted = request(60_000, expected=300, slo_ttft_s=slo_ttft_s, slo_itl_s=0.05)
    crowded = worker("kept", Role.BOTH, num_running=60, kv_tokens=8000, mean_expected=13.0, stall_left_s=1e3)
    strained = worker("lost", Role.BOTH, num_running=1, kv_tokens=800, mean_expected=13.0, stall_left_s=0.01)
    chosen = choose(crowded, strained, routable=wanted).chosen
    assert (chosen.decode, chosen.gives_up) == ("kept", Sacrifice.NOTHING)


def test_what_a_request_has_waited_is_taken_off_its_slo():
    view = fleet(worker("p", Role.PREFILL, queue_s=3.0), worker("d", Role.DECODE, **BUSY, stall_left_s=0.01))
    for waited_s, given_up in ((0.0, Sacrifice.NOTHING), (2.0, Sacrifice.TTFT)):
        chosen = Headrace().choose(request(**SLO), replace(view, waited_s=waited_s)).chosen
        assert (chosen.prefill, chosen.gives_up) == ("p", given_up)


def test_its_own_stream_keeps_its_slo_too():
    """Of three tokens two gaps: a handover of 0.1 s is too long for a mean of 50 ms."""
    short, long = request(expected=3, **SLO), request(expected=300, **SLO)
    links = Links(bytes_per_s=2.5e9)
    both = worker("p", Role.PREFILL), worker("d", Role.DECODE)
    pairs = [
        next(way for way in choose(*both, routable=routable, links=links).candidates if way.prefill)
        for routable in (short, long)
    ]
    assert [way.gives_up for way in pairs] == [Sacrifice.ITL, Sacrifice.NOTHING]


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
    workers = worker("p", Role.PREFILL, queue_s=20.0), worker("d", Role.DECODE, **BUSY)
    assert choose(*workers).chosen.prefill == "p"
    cheap = Headrace(CostModel(pause_steps=1e6)).choose(request(), fleet(*workers)).chosen
    assert cheap.prefill is None
    late = worker("b", Role.BOTH, queue_s=5.0)
    assert choose(late).is_held
    assert not Headrace(CostModel(round_trip_s=60.0)).choose(request(), fleet(late)).is_held


def test_a_prompt_that_would_cost_a_stream_its_slo_wherever_it_goes_is_held_while_it_has_time_or_makes_way():
    strained = worker("d", Role.BOTH, num_running=4, kv_tokens=8000, mean_expected=300.0, stall_left_s=0.1)
    calm = replace(strained, stall_left_s=50.0)
    wanted = request(4000, slo_ttft_s=5.0, slo_itl_s=0.05)

    def answer(beside, routable=wanted, **waiting):
        return Headrace().choose(routable, replace(fleet(beside), **waiting))

    held = answer(strained)
    assert (held.is_held, held.spares_streams, held.chosen.gives_up) == (True, True, Sacrifice.ITL)
    assert held.held_because == "a stream on d would miss its time between tokens"
    assert not answer(strained, waited_s=4.2).is_held
    late = answer(strained, waited_s=9.0, lets_pass=True)
    assert (late.is_held, late.spares_streams, late.chosen.gives_up) == (True, True, Sacrifice.ITL_AND_TTFT)
    assert not answer(strained, waited_s=70.0).is_held  # it is its turn
    assert not answer(strained, request(4000, slo_itl_s=0.05)).is_held
    assert not answer(calm).is_held
    assert Headrace().choose(wanted, fleet(strained, replace(calm, worker=WorkerId("e")))).chosen.decode == "e"


def test_a_prompt_whose_own_stream_can_never_keep_its_slo_spares_nobody_by_waiting():
    calm = worker("d", Role.BOTH, num_running=4, kv_tokens=8000, mean_expected=300.0, stall_left_s=0.5)
    own_s = calm.latency.step_s(5, 12_000) / 2
    wanted = request(1500, slo_ttft_s=5.0, slo_itl_s=own_s)
    choice = choose(calm, routable=wanted)
    assert (choice.is_held, choice.chosen.gives_up, choice.chosen.strains) == (False, Sacrifice.ITL, False)


def test_a_prompt_that_would_make_another_late_begins_in_a_step_of_its_own():
    forming = worker("d", Role.BOTH, shared_tokens=1000, shared_s=0.2, num_sharing=2, late_in_s=0.1)
    wanted = request(2000, slo_ttft_s=5.0)

    def answer(beside, routable=wanted, **waiting):
        return Headrace().choose(routable, replace(fleet(beside), num_waiting=100, **waiting))

    held = answer(forming)
    assert (held.is_held, held.lacks_room, held.chosen.delays) == (True, False, True)
    assert held.held_because == "d begins a step in which another prompt would be late with it"
    assert answer(forming, waited_s=9.0, makes_way=True).is_held
    assert not answer(forming, waited_s=70.0).is_held  # it is its turn
    assert not answer(forming, request(2000)).is_held  # it could wait for ever
    roomy = answer(replace(forming, late_in_s=10.0))
    assert (roomy.is_held, roomy.chosen.delays) == (False, False)


CROWDED = "it would be in time only in a step that leaves others out; they go first"


@pytest.mark.parametrize(
    ("num_hopeful", "tokens", "spare_s", "fixed_s", "because"),
    [
        (30, 100, 0.004, 0.03, CROWDED),
        (30, 100, 0.050, 0.03, ""),  # 17 of the 20 that a step takes
        (2, 100, 0.004, 0.03, ""),  # the other one has a place
        (30, 100, 0.004, 0.001, ""),  # a step of its own costs less than a prompt …
        (30, 100, 0.000, 0.0, ""),  # … or nothing
        (30, 2000, 0.004, 0.03, ""),  # hardly any of them shares its step
        (0, 100, 0.004, 0.03, ""),  # who waits is late, or has no SLO
        (30, 100, -0.001, 0.03, "it would be late; those that can be in time go first"),
    ],
)
def test_a_prompt_makes_way_that_is_in_time_only_where_a_step_leaves_more_than_one_of_those_who_wait_out(
    num_hopeful, tokens, spare_s, fixed_s, because
):
    prior = LatencyPrior(prefill_fixed_s=fixed_s, prefill_per_token_s=3e-5, prefill_per_pair_s=0.0)
    idle = replace(worker("b", Role.BOTH), latency=LatencyModel(prior, FACTS.max_step_tokens))
    view = replace(fleet(idle), num_waiting=30, hopeful=Hopeful(num_hopeful, tokens, tokens * 3e-5))
    alone = choose(idle, routable=request(100)).chosen
    choice = Headrace().choose(request(100, slo_ttft_s=alone.ttft_s + spare_s), view)
    assert (choice.is_held, choice.makes_way_because) == (False, because)
    assert Headrace().choose(request(100), view).makes_way_because == ""
