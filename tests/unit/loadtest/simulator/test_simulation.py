import random
import statistics
from dataclasses import replace

import pytest

from loadtest.report import fairness
from loadtest.simulator.records import Ending
from loadtest.simulator.scenario import Faults, Kill, Scenario, engine_facts
from loadtest.simulator.simulation import Simulation
from loadtest.workloads import Session, Turn, Workload, load, segment_names
from planes.wire.messages import WorkerId
from router.router import Router
from router.settings import RouterSettings

FACTS = engine_facts(block_size=512, num_blocks=1000, link_gbps=100)
HOP_S = 0.0005


def scenario(policy="round_robin", prefill=0, decode=0, both=0, **settings):
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


def test_one_request_on_one_worker_takes_what_its_steps_take():
    result = Simulation(scenario(both=1), workload(Session(1.0, (alone(5000, 3),)))).run()
    record = result.records[0]
    prefill_s = prefill_step_s(2048, 0) + prefill_step_s(2048, 2048) + prefill_step_s(904, 4096)
    assert record.ttft_s == pytest.approx(2 * HOP_S + prefill_s)
    # The first token's KV is computed together with the second token's draw, and so on.
    assert record.last_at - record.first_at == pytest.approx(decode_step_s(5001) + decode_step_s(5002), rel=1e-3)
    assert result.workers[0].busy_s == pytest.approx(prefill_s + decode_step_s(5001) + decode_step_s(5002), rel=1e-3)


@pytest.mark.parametrize("num_tokens", [1000, 1024])
def test_a_handed_over_request_gets_its_first_token_before_its_kv_cache_moves(num_tokens):
    session = Session(0.0, (alone(num_tokens, 2),))
    record = Simulation(scenario(prefill=1, decode=1), workload(session)).run().records[0]
    assert record.ttft_s == pytest.approx(2 * HOP_S + prefill_step_s(num_tokens, 0))
    assert record.is_handed_over


def test_an_answer_of_one_token_is_not_handed_over():
    simulation = Simulation(scenario(prefill=1, decode=1), workload(Session(0.0, (alone(1000, 1),))))
    result = simulation.run()
    assert result.records[0].ttft_s == pytest.approx(2 * HOP_S + prefill_step_s(1000, 0))
    assert (result.records[0].is_handed_over, result.workers[0].prompts) == (False, 1)
    assert simulation.lives[WorkerId("prefill-000")].core.num_leases == 0


def test_a_handed_over_request_adds_two_hops_the_transfer_and_nothing_to_its_first_token():
    result = Simulation(scenario(prefill=1, decode=1), workload(Session(0.0, (alone(1023, 2),)))).run()
    record = result.records[0]
    assert record.ttft_s == pytest.approx(2 * HOP_S + prefill_step_s(1023, 0))
    transfer_s = 2 * FACTS.bytes_per_block / 12.5e9 + FACTS.latency.handover_fixed_s
    assert record.last_at - record.first_at == pytest.approx(2 * HOP_S + transfer_s + decode_step_s(1024), rel=1e-3)
    assert (record.is_handed_over, record.handover_blocks) == (True, 2)


def test_transfers_of_one_sender_wait_for_each_other():
    # While the first prompt is computed two others arrive. They share the next step, so their transfers begin together.
    prompts = [alone(2048, 1), alone(1023, 2, 1), alone(1023, 2, 2)]
    _, *records = (
        Simulation(scenario(prefill=1, decode=3), workload(*(Session(0.0, (turn,)) for turn in prompts))).run().records
    )
    transfer_s = 2 * FACTS.bytes_per_block / 12.5e9
    assert records[1].last_at - records[0].last_at == pytest.approx(transfer_s)


def test_a_cached_prefix_is_not_computed_again():
    sessions = [Session(at, (alone(5000, 2),)) for at in (0.0, 10.0)]
    first, second = Simulation(scenario(both=1), workload(*sessions)).run().records
    assert (first.cached_tokens, second.cached_tokens) == (0, 4608)
    assert second.ttft_s == pytest.approx(2 * HOP_S + prefill_step_s(392, 4608))


def test_a_turn_follows_the_answer_after_its_think_time():
    turns = (alone(1024, 5), replace(alone(2048, 5), think_s=3.0))
    first, second = Simulation(scenario(both=1), workload(Session(0.0, turns))).run().records
    assert second.sent_at == pytest.approx(first.last_at + 3.0)
    assert second.cached_tokens == 1024


def test_clients_of_a_closed_loop_begin_together_and_go_on_as_they_are_answered():
    sessions = [Session(0.0, (alone(length, 1, segment),)) for segment, length in enumerate((4000, 1000, 1000, 1000))]
    result = Simulation(scenario("least_loaded", both=2), Workload("small", 512, tuple(sessions), num_clients=2)).run()
    long, *short = result.records
    assert [record.sent_at for record in result.records] == [
        0.0,
        0.0,
        short[0].last_at,
        pytest.approx(short[1].last_at),
    ]
    assert all(record.ending is Ending.FINISHED for record in result.records)
    assert long.last_at > short[1].sent_at


def test_a_session_of_a_closed_loop_keeps_its_pauses_and_the_next_begins_when_it_has_ended():
    first = Session(0.0, (alone(1000, 1), replace(alone(1500, 1), think_s=3.0)))
    sessions = (first, Session(0.0, (alone(1000, 1, 7),)))
    one, two, three = Simulation(scenario(both=1), Workload("small", 512, sessions, num_clients=1)).run().records
    assert two.sent_at == pytest.approx(one.last_at + 3.0)
    assert three.sent_at == pytest.approx(two.last_at)


def test_the_queue_waits_as_an_m_d_1_queue_does():
    # A prompt of 2048 tokens fills a step, so service is one step long; one token is all that is asked for.
    service_s, utilisation, count = prefill_step_s(2048, 0), 0.6, 3000
    rng, at, sessions = random.Random(5), 0.0, []
    for segment in range(count):
        at += rng.expovariate(utilisation / service_s)
        sessions.append(Session(at, (alone(2048, 1, segment),)))
    records = Simulation(scenario(both=1), workload(*sessions)).run().records
    waits = [record.ttft_s - service_s - 2 * HOP_S for record in records]
    assert statistics.fmean(waits) == pytest.approx(utilisation * service_s / (2 * (1 - utilisation)), rel=0.1)


@pytest.mark.parametrize("policy", ["headrace", "mooncake", "llmd"])
@pytest.mark.parametrize("workers", [{"prefill": 4, "decode": 2}, {"both": 6}, {"prefill": 2, "decode": 1, "both": 3}])
@pytest.mark.parametrize("gateways", [1, 2])
def test_every_request_ends_exactly_once(policy, workers, gateways):
    load_ = load("conversation", block_size=512, seed=2).scaled(3.0).limited(40)
    result = Simulation(scenario(policy, **workers, num_gateways=gateways), load_).run()
    assert len(result.records) == 40
    assert all(record.ending is Ending.FINISHED for record in result.records)
    assert all(record.first_at <= record.last_at for record in result.records)


def test_what_is_not_finished_in_time_is_counted_as_such():
    hasty = scenario(both=1, drain_s=1.0)
    sessions = [Session(0.0, (alone(5000, 1, segment),)) for segment in range(3)]
    records = Simulation(hasty, workload(*sessions)).run().records
    assert [record.ending for record in records] == [Ending.FINISHED, Ending.UNFINISHED, Ending.UNFINISHED]


def test_a_refused_request_ends_its_session():
    def refusing(_scenario, _number):
        return Router(RouterSettings(slo_ttft_s=1e-6))

    session = Session(0.0, (alone(1024, 5), alone(2048, 5)))
    simulation = Simulation(scenario(both=1), workload(session), make_router=refusing)
    assert [record.ending for record in simulation.run().records] == [Ending.REJECTED]


def test_a_slow_worker_is_slow():
    sessions = [Session(0.0, (alone(2048, 1, segment),)) for segment in (1, 2)]
    slow, normal = Simulation(scenario(both=2, slow_worker=3.0), workload(*sessions)).run().records
    assert slow.ttft_s - 2 * HOP_S == pytest.approx(3 * (normal.ttft_s - 2 * HOP_S))


@pytest.mark.parametrize("gateways", [1, 2, 4])
def test_gateways_that_share_a_fleet_do_not_herd(gateways):
    # Equal prompts every 25 ms, far sooner than reports can tell one gateway of another's choice.
    sessions = [Session(0.025 * n, (alone(2000, 4, n),)) for n in range(64)]
    result = Simulation(scenario("headrace", both=16, num_gateways=gateways), workload(*sessions)).run()
    assert max(worker.prompts for worker in result.workers) <= 8  # twice the even share


def test_a_long_context_is_served_by_blocks_of_any_size():
    facts = engine_facts(block_size=64, num_blocks=8000, link_gbps=100)
    load_ = load("conversation", block_size=64, seed=2).limited(10)
    records = Simulation(replace(scenario(both=2), facts=facts), load_).run().records
    assert all(record.ending is Ending.FINISHED for record in records)


# --- faults ----------------------------------------------------------------------------------------------------------

P, D0, D1, BOTH = (WorkerId(name) for name in ("prefill-000", "decode-001", "decode-002", "both-000"))


def is_clean(simulation):
    """Nothing is reserved, runs or is kept, when the last lease is over."""
    simulation.clock.run(until=simulation.clock.now + simulation.scenario.lease_s + 1)
    bound = sum(gateway.router.stats(now=simulation.clock.now).bound for gateway in simulation.gateways)
    cores = [life.core for life in simulation.lives.values() if life.is_alive]
    loads = [core.load() for core in cores]
    num_legs = sum(load.num_running + load.num_waiting for load in loads)
    return (bound, num_legs, sum(core.num_leases for core in cores)) == (0, 0, 0)


def test_a_stream_is_lost_when_its_worker_was_silent_for_too_long_and_goes_on_elsewhere():
    killed = Faults(kills=[Kill(1.0, D0)])
    turn = alone(1000, 400)
    calm = Simulation(scenario(prefill=1, decode=2), workload(Session(0.0, (turn,)))).run().records[0]
    simulation = Simulation(scenario(prefill=1, decode=2, faults=killed), workload(Session(0.0, (turn,))))
    record = simulation.run().records[0]
    assert (record.ending, record.num_received, record.num_migrations) == (Ending.FINISHED, 400, 1)
    assert record.first_at == calm.first_at
    # Silence, then the prompt and what the client had by then once more, but for the prompt's full blocks.
    assert 3.0 < record.last_at - calm.last_at < 3.2
    assert 1000 < record.recomputed_tokens < 1400
    assert is_clean(simulation)


def test_a_worker_starts_anew_with_nothing_cached():
    sessions = [Session(at, (alone(5000, 2),)) for at in (0.0, 20.0, 30.0)]
    killed = Faults(kills=[Kill(10.0)], restart_s=5.0)
    simulation = Simulation(scenario(both=1, faults=killed), workload(*sessions))
    result = simulation.run()
    assert [record.cached_tokens for record in result.records] == [0, 0, 4608]
    assert (simulation.lives[BOTH].epoch, result.workers[0].num_kills) == (2, 1)


def test_a_worker_that_is_back_before_its_death_was_noticed_ends_what_it_had():
    killed = Faults(kills=[Kill(1.0)], restart_s=0.5)
    simulation = Simulation(scenario(both=1, faults=killed), workload(Session(0.0, (alone(1000, 400),))))
    record = simulation.run().records[0]
    assert (record.ending, record.num_received, record.num_migrations) == (Ending.FINISHED, 400, 1)
    assert is_clean(simulation)


def test_a_kept_kv_cache_whose_decode_worker_is_killed_is_freed_when_its_lease_ends():
    killed = Faults(kills=[Kill(0.13, D0)], restart_s=100.0)  # the prompt is computed after 0.14 s
    simulation = Simulation(scenario(prefill=1, decode=2, faults=killed), workload(Session(0.0, (alone(1000, 5),))))
    record = simulation.run().records[0]
    assert (record.ending, record.num_received, record.num_migrations) == (Ending.FINISHED, 5, 1)
    assert is_clean(simulation)


def test_a_kv_cache_is_lost_with_the_worker_that_kept_it():
    one = workload(Session(0.0, (alone(100_000, 5),)))
    prefill_s = Simulation(scenario(prefill=1, decode=2), one).run().records[0].ttft_s
    killed = Faults(kills=[Kill(prefill_s + 0.1, P)], restart_s=5.0)  # the transfer takes a second
    simulation = Simulation(scenario(prefill=1, decode=2, faults=killed), one)
    record = simulation.run().records[0]
    assert (record.ending, record.num_received, record.num_migrations) == (Ending.FINISHED, 5, 1)
    assert is_clean(simulation)


def test_a_ticket_that_expired_costs_another_attempt():
    # The decode worker's blocks are taken by another request for longer than the lease.
    facts = engine_facts(block_size=512, num_blocks=300, link_gbps=100)
    sessions = [Session(0.0, (alone(100_000, 4000, 1),)), Session(0.1, (alone(100_001, 5, 2),))]
    tight = replace(scenario(prefill=1, decode=1, lease_s=2.0), facts=facts)
    simulation = Simulation(tight, workload(*sessions))
    result = simulation.run()
    assert [record.ending for record in result.records] == [Ending.FINISHED, Ending.FINISHED]
    assert result.workers[0].num_expired >= 1
    assert result.records[1].num_received == 5
    assert is_clean(simulation)


def test_legs_that_are_refused_as_busy_are_run_elsewhere():
    sessions = [Session(0.5 * n, (alone(1000, 20, n),)) for n in range(100)]
    simulation = Simulation(scenario(prefill=2, decode=2, faults=Faults(busy_share=0.2)), workload(*sessions))
    result = simulation.run()
    assert sum(worker.num_refused for worker in result.workers) > 10
    assert sum(record.num_retries + record.num_migrations for record in result.records) > 10
    assert sum(record.ending is Ending.FINISHED for record in result.records) >= 95
    assert is_clean(simulation)


@pytest.mark.parametrize("workers", [{"prefill": 4, "decode": 3}, {"both": 6}, {"prefill": 2, "decode": 1, "both": 3}])
@pytest.mark.parametrize("gateways", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_with_kills_every_request_ends_once_whole_and_nothing_is_left(workers, gateways, seed):
    load_ = load("uniform", block_size=512, seed=seed).limited(150)
    faults = Faults(kill_every_s=3.0, restart_s=5.0, busy_share=0.02)
    simulation = Simulation(scenario("headrace", **workers, seed=seed, num_gateways=gateways, faults=faults), load_)
    records = simulation.run().records
    assert len(records) == 150
    assert sum(record.num_migrations for record in records) > 0
    for record in records:
        assert record.ending in {Ending.FINISHED, Ending.FAILED}
        if record.ending is Ending.FINISHED:
            assert record.num_received == record.completion_tokens
            assert record.sent_at <= record.first_at <= record.last_at
    assert is_clean(simulation)


def test_equal_seeds_give_equal_results_and_others_do_not():
    def run(seed):
        faults = Faults(kill_every_s=4.0, restart_s=5.0, busy_share=0.05)
        load_ = load("uniform", block_size=512, seed=0).limited(80)
        result = Simulation(scenario("headrace", prefill=3, decode=2, seed=seed, faults=faults), load_).run()
        return result.records, result.workers, result.duration_s

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("workers", [{"prefill": 1, "decode": 1}, {"both": 1}])
def test_fairness_tells_a_rule_that_shares_from_those_that_let_a_flood_go_first(workers):
    quiet = [Session(0.5 * second, (alone(2000, 4, second),), "quiet") for second in range(60)]
    loud = [Session(5.0, (alone(2000, 4, 1000 + number),), "loud") for number in range(150)]
    load_ = workload(*sorted(quiet + loud, key=lambda session: session.start_s))

    def served(policy):
        simulation = Simulation(scenario(policy, **workers), load_)
        found = fairness(simulation.run().records)
        router = simulation.gateways[0].router
        told = router.stats(now=simulation.clock.now + 10).fairness
        assert told.num_windows > 0
        assert found == pytest.approx(told.mean_index, abs=0.05)  # a client's tokens come a little later
        return found

    assert served("headrace") > 0.97
    assert served("least_loaded") < 0.8
