import random

import numpy as np
import pytest
from msgspec.structs import replace

from planes.wire.messages import HandoverMode, LatencyPrior, RequestId, Role, WorkerId
from router import cost, prices
from router.latency import LatencyModel, LinkModel
from router.policy import FleetView, WorkerView
from router.request import RoutableRequest, Sacrifice
from tests.fakes import FACTS


class Links:
    def link(self, _prefill, _decode):
        return LinkModel(LatencyPrior())


def worker(name, role=Role.DECODE, **load):
    fields = dict.fromkeys(("cached_tokens", "num_running", "num_waiting", "waiting_prefill_tokens", "kv_tokens"), 0)
    fields |= {"handover": HandoverMode.PULL, "queue_s": 0.0, "free_blocks": 1000, "utilisation": 0.0} | load
    return WorkerView(
        worker=WorkerId(name), role=role, facts=FACTS, latency=LatencyModel(FACTS.latency, 2048), **fields
    )


def view(*workers, num_waiting=0):
    return FleetView(
        prefill=[each for each in workers if each.role.can_prefill],
        decode=[each for each in workers if each.role.can_decode],
        links=Links(),
        now=0.0,
        rng=random.Random(0),
        num_waiting=num_waiting,
    )


def request(tokens=1000, expected=100):
    return RoutableRequest(RequestId("r"), "m", np.empty(0, np.uint64), tokens, expected, 1e9)


def test_a_second_of_prompt_work_costs_each_waiting_request_a_second():
    """Of five requests that wait, one is this one; two workers serve the other four."""
    workers = [worker("p0", Role.PREFILL), worker("p1", Role.PREFILL), worker("d")]
    priced = cost.prefill_cost(request(), workers[0], prices.congestion(view(*workers, num_waiting=5)))
    assert priced.inflicted_s == pytest.approx(2 * priced.work_s)
    alone = cost.prefill_cost(request(), workers[0], prices.congestion(view(*workers, num_waiting=1)))
    assert alone.inflicted_s == 0.0
    assert priced.cost_s - alone.cost_s == pytest.approx(2 * priced.work_s)


def test_where_few_wait_the_busy_price_is_the_higher_one():
    busy = worker("p0", Role.PREFILL, prefill_utilisation=0.8)
    for num_waiting, price in ((1, 4.0), (4, 4.0), (10, 9.0)):
        found = prices.congestion(view(busy, worker("d"), num_waiting=num_waiting))
        assert found.price(busy.worker, 0.8) == pytest.approx(price)


def test_work_delays_those_who_wait_for_its_worker_alone():
    workers = [worker("p0", Role.PREFILL), worker("p1", Role.PREFILL), worker("d")]
    looked = replace(view(*workers, num_waiting=5), waiting_shares={"p0": 0.75, "p1": 0.25})
    found = prices.congestion(looked)
    assert [found.price(each.worker, 0.0) for each in workers] == [3.0, 1.0, 0.0]


@pytest.mark.parametrize("full", [{"num_running": 8}, {"num_running": 4, "free_blocks": 10}])
def test_on_a_full_worker_the_first_step_waits_until_one_of_those_that_run_has_ended(full):
    room = cost.decode_cost(request(), worker("d", **full | {"num_running": 4, "free_blocks": 1000}))
    filled = cost.decode_cost(request(), worker("d", **full))
    assert (room.has_room, filled.has_room) == (True, False)
    beside = min(full["num_running"], FACTS.max_batch - 1)  # when it has room
    step_s = worker("d").latency.step_s(beside + 1, 1000)
    assert filled.first_step_s == pytest.approx(step_s + 100 * step_s / beside)
    assert filled.cost_s == pytest.approx(filled.first_step_s + filled.decode_s + filled.inflicted_s)


def test_a_request_served_where_it_is_prefilled_waits_for_room_to_decode_too():
    full, free = worker("b", Role.BOTH, num_running=8), worker("b", Role.BOTH, num_running=7)
    for each, is_waiting in ((full, True), (free, False)):
        way = cost.local(request(), cost.prefill_cost(request(), each), cost.decode_cost(request(), each))
        served = way.candidate()
        assert (served.first_step_s > 0.05) is is_waiting
        assert served.ttft_s == pytest.approx(served.queue_s + served.prefill_s + served.first_step_s)


def test_each_that_waits_for_room_before_it_takes_the_place_of_one_that_ends():
    full = worker("d", num_running=8)
    alone, third = (
        cost.decode_cost(request(), full),
        cost.decode_cost(request(), worker("d", num_running=8, without_room=2)),
    )
    assert third.room_s == pytest.approx(3 * alone.room_s)
    assert not cost.decode_cost(request(), worker("d", num_running=6, without_room=2)).has_room
    assert cost.decode_cost(request(), worker("d", num_running=5, without_room=2)).has_room


def test_those_that_are_bound_to_a_worker_take_its_room_though_its_reports_do_not_count_them_as_running():
    assert not cost.decode_cost(request(), worker("d", num_running=3, num_streams=8)).has_room


@pytest.mark.parametrize(
    ("expected", "slo", "sender", "is_held"),
    [
        (2000, {"slo_ttft_s": 1.0, "slo_itl_s": 0.05}, {}, False),  # a pause that its mean bears
        (20_000, {"slo_ttft_s": 1.0, "slo_itl_s": 0.05}, {}, False),  # one of many seconds, in as many tokens more
        (20_000, {"slo_ttft_s": 1.0, "slo_itl_s": 0.05}, {"free_blocks": 1}, True),  # the prefill worker is full
        (20_000, {"slo_ttft_s": 1.0, "slo_itl_s": 0.05}, {"keeps_s": 1.0}, True),  # it would give up before that
        (2000, {"slo_ttft_s": 1.0, "slo_itl_s": 0.0095}, {}, True),
        (2000, {"slo_ttft_s": 1.0}, {}, False),  # nobody says how long a stream may take: four steps a token
        (2000, {}, {}, False),
        (2000, {}, {"free_blocks": 1}, True),
        (2000, {}, {"keeps_s": 0.1}, True),
    ],
)
def test_a_first_token_need_not_wait_for_room_where_its_stream_bears_the_pause(expected, slo, sender, is_held):
    wanted = replace(request(10, expected), **slo)
    full = worker("d", num_running=8, num_streams=8)
    way = cost.pair(
        wanted,
        cost.prefill_cost(wanted, worker("p", Role.PREFILL, **sender)),
        cost.decode_cost(wanted, full),
        LinkModel(LatencyPrior()),
    )
    assert way.waits_for_room == ("d" if is_held else None)


@pytest.mark.parametrize(("without_room", "is_held"), [(0, False), (10, False), (30, True)])
def test_without_an_slo_a_stream_bears_a_pause_that_makes_its_tokens_four_steps_apart(without_room, is_held):
    """Every one before it keeps its place for a stream's seventh, eight running: 31 of them are 4.4 steps a token."""
    wanted = request(10, 2000)
    full = worker("d", num_running=8, num_streams=8, without_room=without_room)
    legs = cost.prefill_cost(wanted, worker("p", Role.PREFILL)), cost.decode_cost(wanted, full)
    assert cost.pair(wanted, *legs, LinkModel(LatencyPrior())).waits_for_room == ("d" if is_held else None)


def test_a_prompt_to_be_handed_over_waits_for_a_place_beside_those_that_decode_where_it_is_computed():
    """An engine that has as many sequences as it takes begins no other one, though that would soon be gone."""
    wanted = replace(request(10, 2000), slo_ttft_s=1.0, slo_itl_s=0.05)
    goals = prices.Goals(ttft_s=1.0, itl_s=0.05)
    free, *full = [
        cost.pair(
            wanted,
            cost.prefill_cost(wanted, worker("p", Role.BOTH, mean_expected=2000, **sender)),
            cost.decode_cost(wanted, worker("d")),
            LinkModel(LatencyPrior()),
            goals,
        ).candidate()
        for sender in (
            {"num_running": 7, "num_streams": 7},
            {"num_running": 8, "num_streams": 8},
            {"num_running": 8, "num_streams": 8, "without_room": 1},
            {"num_running": 7, "num_streams": 7, "free_blocks": 0},
        )
    ]
    assert (free.waits_for_room, free.gives_up) == (None, Sacrifice.NOTHING)
    step_s = worker("p").latency.step_s(8, 1000)
    assert full[0].ttft_s - free.ttft_s == pytest.approx(2000 * step_s / 7, rel=0.01)
    assert full[1].queue_s == pytest.approx(2 * full[0].queue_s, rel=0.01)
    for way in full:
        assert (way.waits_for_room, way.gives_up) == ("p", Sacrifice.TTFT)


@pytest.mark.parametrize("makes_way", [False, True])
def test_one_that_is_late_for_its_first_token_takes_no_seat_from_those_still_in_time(makes_way):
    wanted = replace(request(10, 2000), slo_ttft_s=1.0, slo_itl_s=0.05)
    legs = (
        cost.prefill_cost(wanted, worker("p", Role.PREFILL)),
        cost.decode_cost(wanted, worker("d", num_running=8, num_streams=8)),
    )
    goals = prices.Goals(ttft_s=-1.0, itl_s=0.05, makes_way=makes_way)
    lacking = cost.pair(wanted, *legs, LinkModel(LatencyPrior()), goals).waits_for_room
    assert lacking == ("d" if makes_way else None)


@pytest.mark.parametrize("slo", [{}, {"slo_ttft_s": 1.0, "slo_itl_s": 0.05}])
@pytest.mark.parametrize(
    "load",
    [{}, {"queue_s": 0.5}, {"num_running": FACTS.max_batch}, {"num_running": 8, "free_blocks": 0}],
    ids=["idle", "computing", "no seat", "no blocks"],
)
def test_an_answer_of_one_token_costs_a_pair_what_its_prefill_worker_takes(slo, load):
    """Its decode worker never sees it, whatever there is."""
    asked = replace(request(100, expected=1), is_first_token_exact=True, **slo)
    sender, link = cost.prefill_cost(asked, worker("p", Role.PREFILL)), LinkModel(LatencyPrior())
    way = cost.pair(asked, sender, cost.decode_cost(asked, worker("d", **load)), link)
    assert (way.total_s, way.waits_for_room, way.gives_up) == (sender.cost_s, None, Sacrifice.NOTHING)
    two = replace(asked, expected_tokens=2)
    more = cost.pair(two, sender, cost.decode_cost(two, worker("d", **load)), link)
    assert more.total_s > way.total_s


def test_an_answer_of_one_token_costs_nothing_beside_its_prompt():
    asked = request(100, expected=1)
    for each in (worker("d"), worker("d", num_running=5)):
        computing = cost.prefill_cost(asked, each)
        assert cost.local(asked, computing, cost.decode_cost(asked, each)).total_s == computing.cost_s


def test_a_worker_that_is_busy_with_one_client_at_a_time_keeps_nobody_waiting():
    busy = worker("p", Role.PREFILL, prefill_utilisation=0.9)
    prices_of = [
        prices.congestion(replace(view(busy, worker("d")), found_busy=found)).price(WorkerId("p"), 0.9)
        for found in (0.0, 0.5, 1.0)
    ]
    assert prices_of[0] == 0.0
    assert 0.0 < prices_of[1] < prices_of[2]
