import random
import statistics
from dataclasses import replace

import numpy as np
import pytest

from loadtest.fleet import Clock, Ending, Gaps, Run, Scenario, engine_facts
from loadtest.workloads import Session, Turn, Workload, load, segment_names
from planes.wire.errors import Rejected
from router.router import Router

FACTS = engine_facts(block_size=512, num_blocks=1000, link_gbps=100)
HOP_S = 0.0005


def fleet(policy="round_robin", prefill=0, decode=0, both=0, **settings):
    return Scenario(policy, prefill, decode, both, FACTS, **settings)


def alone(prompt_tokens, completion_tokens, segment=0):
    return Turn(0.0, prompt_tokens, completion_tokens, segment_names([(segment, prompt_tokens)], 512))


def workload(*sessions):
    return Workload("small", 512, sessions)


def prefill_step_s(tokens, before):
    speed = FACTS.latency
    pairs = tokens * before + tokens * (tokens + 1) // 2
    return speed.prefill_fixed_s + speed.prefill_per_token_s * tokens + speed.prefill_per_pair_s * pairs


def decode_step_s(kv_tokens):
    speed = FACTS.latency
    return speed.step_fixed_s + speed.step_per_sequence_s + speed.step_per_kv_token_s * kv_tokens


def test_calls_come_in_the_order_of_their_instants():
    clock, seen = Clock(), []
    for name, at in (("late", 2.0), ("first", 1.0), ("second", 1.0), ("beyond", 9.0)):
        clock.at(at, seen.append, name)
    clock.run(until=5.0, is_over=lambda: False)
    assert (seen, clock.now) == (["first", "second", "late"], 2.0)


def test_gaps_keep_their_quantiles_to_a_percent():
    gaps = Gaps()
    gaps.add_between([0.0, 0.01, 0.02], 98)  # too few for an array
    gaps.add_between(list(np.arange(21) * 0.02), 2)
    assert gaps.quantile(0.5) == pytest.approx(0.01, rel=0.011)
    assert gaps.quantile(0.99) == pytest.approx(0.02, rel=0.011)
    assert Gaps().quantile(0.5) is None


def test_one_request_on_one_worker_takes_what_its_steps_take():
    result = Run(fleet(both=1), workload(Session(1.0, (alone(5000, 3),)))).simulate()
    record = result.records[0]
    prefill_s = prefill_step_s(2048, 0) + prefill_step_s(2048, 2048) + prefill_step_s(904, 4096)
    assert record.ttft_s == pytest.approx(2 * HOP_S + prefill_s)
    # The first token's KV is computed together with the second token's draw, and so on.
    assert record.last_at - record.first_at == pytest.approx(decode_step_s(5001) + decode_step_s(5002), rel=1e-3)
    assert result.workers[0].busy_s == pytest.approx(prefill_s + decode_step_s(5001) + decode_step_s(5002), rel=1e-3)


def test_a_handed_over_request_adds_two_hops_the_transfer_and_nothing_to_its_first_token():
    result = Run(fleet(prefill=1, decode=1), workload(Session(0.0, (alone(1024, 2),)))).simulate()
    record = result.records[0]
    assert record.ttft_s == pytest.approx(2 * HOP_S + prefill_step_s(1024, 0))
    transfer_s = 2 * FACTS.bytes_per_block / 12.5e9 + FACTS.latency.handover_fixed_s
    assert record.last_at - record.first_at == pytest.approx(2 * HOP_S + transfer_s + decode_step_s(1025), rel=1e-3)
    assert (record.is_handed_over, record.handover_blocks) == (True, 2)


def test_transfers_of_one_sender_wait_for_each_other():
    # While the first prompt is computed two others arrive. They share the next step, so their transfers begin together.
    prompts = [alone(2048, 1), alone(1024, 2, 1), alone(1024, 2, 2)]
    _, *records = (
        Run(fleet(prefill=1, decode=3), workload(*(Session(0.0, (turn,)) for turn in prompts))).simulate().records
    )
    transfer_s = 2 * FACTS.bytes_per_block / 12.5e9
    assert records[1].last_at - records[0].last_at == pytest.approx(transfer_s)


def test_a_cached_prefix_is_not_computed_again():
    sessions = [Session(at, (alone(5000, 2),)) for at in (0.0, 10.0)]
    first, second = Run(fleet(both=1), workload(*sessions)).simulate().records
    assert (first.cached_tokens, second.cached_tokens) == (0, 4608)
    assert second.ttft_s == pytest.approx(2 * HOP_S + prefill_step_s(392, 4608))


def test_a_turn_follows_the_answer_after_its_think_time():
    turns = (alone(1024, 5), replace(alone(2048, 5), think_s=3.0))
    first, second = Run(fleet(both=1), workload(Session(0.0, turns))).simulate().records
    assert second.sent_at == pytest.approx(first.last_at + 3.0)
    assert second.cached_tokens == 1024


def test_the_queue_waits_as_an_m_d_1_queue_does():
    # A prompt of 2048 tokens fills a step, so service is one step long; one token is all that is asked for.
    service_s, utilisation, count = prefill_step_s(2048, 0), 0.6, 3000
    rng, at, sessions = random.Random(5), 0.0, []
    for segment in range(count):
        at += rng.expovariate(utilisation / service_s)
        sessions.append(Session(at, (alone(2048, 1, segment),)))
    records = Run(fleet(both=1), workload(*sessions)).simulate().records
    waits = [record.ttft_s - service_s - 2 * HOP_S for record in records]
    assert statistics.fmean(waits) == pytest.approx(utilisation * service_s / (2 * (1 - utilisation)), rel=0.1)


@pytest.mark.parametrize("policy", ["headrace", "mooncake", "llmd"])
@pytest.mark.parametrize("workers", [{"prefill": 4, "decode": 2}, {"both": 6}, {"prefill": 2, "decode": 1, "both": 3}])
@pytest.mark.parametrize("gateways", [1, 2])
def test_every_request_ends_exactly_once(policy, workers, gateways):
    load_ = load("conversation", block_size=512, seed=2).scaled(3.0).limited(40)
    result = Run(fleet(policy, **workers, num_gateways=gateways), load_).simulate()
    assert len(result.records) == 40
    assert all(record.ending is Ending.FINISHED for record in result.records)
    assert all(record.first_at <= record.last_at for record in result.records)


def test_what_is_not_finished_in_time_is_counted_as_such():
    scenario = fleet(both=1, drain_s=1.0)
    sessions = [Session(0.0, (alone(5000, 1, segment),)) for segment in range(3)]
    records = Run(scenario, workload(*sessions)).simulate().records
    assert [record.ending for record in records] == [Ending.FINISHED, Ending.UNFINISHED, Ending.UNFINISHED]


def test_a_refused_request_ends_its_session():
    class Refusing(Router):
        def submit(self, request, *, now):
            raise Rejected("no")

    session = Session(0.0, (alone(1024, 5), alone(2048, 5)))
    run = Run(fleet(both=1), workload(session), make_router=lambda _scenario, _number: Refusing())
    assert [record.ending for record in run.simulate().records] == [Ending.REJECTED]


def test_a_slow_worker_is_slow():
    sessions = [Session(0.0, (alone(2048, 1, segment),)) for segment in (1, 2)]
    slow, normal = Run(fleet(both=2, slow_worker=3.0), workload(*sessions)).simulate().records
    assert slow.ttft_s - 2 * HOP_S == pytest.approx(3 * (normal.ttft_s - 2 * HOP_S))


@pytest.mark.parametrize("gateways", [1, 2, 4])
def test_gateways_that_share_a_fleet_do_not_herd(gateways):
    # Equal prompts every 25 ms, far sooner than reports can tell one gateway of another's choice.
    sessions = [Session(0.025 * n, (alone(2000, 4, n),)) for n in range(64)]
    result = Run(fleet("headrace", both=16, num_gateways=gateways), workload(*sessions)).simulate()
    assert max(worker.prompts for worker in result.workers) <= 8  # twice the even share


def test_a_long_context_is_served_by_blocks_of_any_size():
    facts = engine_facts(block_size=64, num_blocks=8000, link_gbps=100)
    load_ = load("conversation", block_size=64, seed=2).limited(10)
    records = Run(replace(fleet(both=2), facts=facts), load_).simulate().records
    assert all(record.ending is Ending.FINISHED for record in records)
