from dataclasses import replace

import msgspec
import numpy as np
import pytest

from loadtest.grid.capacity import Capacity, alone_s, capacity, new_tokens, slo
from loadtest.simulator.scenario import Scenario
from loadtest.workloads import Turn, segment_names
from planes.wire.messages import EngineFacts, LatencyPrior

SPEED = LatencyPrior(
    prefill_fixed_s=0.01,
    prefill_per_token_s=1e-4,
    prefill_per_pair_s=0.0,
    step_fixed_s=0.01,
    step_per_sequence_s=0.001,
    step_per_kv_token_s=0.0,
    handover_fixed_s=0.0,
    handover_bytes_per_s=1e6,
)
FACTS = EngineFacts(
    block_size=10,
    num_blocks=10_000,
    context_length=50_000,
    max_batch=10,
    max_step_tokens=1000,
    bytes_per_block=10_000,
    vocab_size=256,
    latency=SPEED,
)


def fleet(num_prefill=0, num_decode=0, num_both=0, facts=FACTS, **changes):
    return replace(Scenario("", num_prefill, num_decode, num_both, facts=facts), **changes)


def turns(count=10, prompt_tokens=1000, answer=11, shared=0):
    segments = [[(0, shared), (1 + number, prompt_tokens - shared)] for number in range(count)]
    names = [segment_names(each if shared else each[1:], FACTS.block_size) for each in segments]
    return [Turn(0.0, prompt_tokens, answer, each) for each in names]


# A prompt of 1000 tokens takes a full step, 0.01 + 0.1 s. Ten steps of ten take 0.02 s each: 0.02 s of a request.


def test_workers_that_do_both_do_one_after_the_other():
    assert capacity(turns(), fleet(num_both=2)).requests_per_s == pytest.approx(2 / 0.13)


def test_the_side_that_is_full_first_limits_a_pair():
    assert capacity(turns(), fleet(1, 1)).requests_per_s == pytest.approx(1 / 0.11)
    assert capacity(turns(answer=201), fleet(1, 1)).requests_per_s == pytest.approx(1 / 0.4)


def test_an_answer_of_one_token_needs_no_decode_worker():
    assert capacity(turns(answer=1), fleet(1, 1)).requests_per_s == pytest.approx(1 / 0.11)


def test_what_is_shared_is_computed_once():
    assert new_tokens(turns(count=4, shared=900), FACTS.block_size) == 1000 + 3 * 100
    assert capacity(turns(count=4, shared=900, answer=1), fleet(1, 1)).requests_per_s == pytest.approx(
        1 / (0.11 * 0.325)
    )


def test_the_answer_of_the_turn_before_is_not_new():
    first = Turn(0.0, 100, 50, segment_names([(1, 100), (2, 50)], 10))
    second = Turn(0.0, 200, 50, segment_names([(1, 100), (2, 50), (3, 50), (4, 50)], 10))
    assert new_tokens([first, second], 10) == 100 + 50


def test_a_slow_worker_counts_for_less():
    assert capacity(turns(answer=1), fleet(num_both=4, slow_worker=2.0)).requests_per_s == pytest.approx(3.5 / 0.11)


def test_the_batch_is_what_the_kv_cache_holds():
    small = msgspec.structs.replace(FACTS, num_blocks=202)  # two sequences of 1000 tokens and half an answer
    assert capacity(turns(answer=12), fleet(num_both=1, facts=small)).requests_per_s == pytest.approx(
        1 / (0.11 + 11 * 0.012 / 2)
    )


def test_short_prompts_share_a_step_as_far_as_there_are_seats():
    few = msgspec.structs.replace(FACTS, max_batch=4)
    assert capacity(turns(prompt_tokens=100, answer=1), fleet(num_both=1)).requests_per_s == pytest.approx(1 / 0.011)
    assert capacity(turns(prompt_tokens=100, answer=1), fleet(num_both=1, facts=few)).requests_per_s == pytest.approx(
        1 / 0.0125
    )


def test_clients_of_a_closed_loop_follow_littles_law():
    assert Capacity(10.0, 0.8).clients(0.5) == 4
    assert Capacity(10.0, 0.8).clients(0.5, think_s=1.2) == 10
    assert Capacity(0.1, 0.1).clients(0.5) == 1
    # a full step's prompts are in flight where steps are full of short ones
    assert capacity(turns(prompt_tokens=100, answer=1), fleet(num_both=2)).clients(1.0) == pytest.approx(20, abs=1)
    # and as many as decode at once, with what is computed beside them
    assert capacity(turns(answer=201), fleet(num_both=1)).clients(1.0) == pytest.approx(10, abs=1)


def test_the_slo_is_what_a_moderately_busy_fleet_keeps_thrice_and_five_times():
    assert alone_s(FACTS, 1000) == pytest.approx(0.11)
    limits = slo(turns(), fleet(num_both=1))
    assert (limits.ttft_s, limits.tpot_s) == (pytest.approx(0.55), pytest.approx(3 * 0.026))
    assert slo(turns(prompt_tokens=100), fleet(num_both=1)).ttft_s == 0.5
    # a megabyte of KV cache moves in a second, once in ten gaps
    assert slo(turns(), fleet(1, 1)).tpot_s == pytest.approx(3 * (0.026 + 0.1))


def test_an_slo_is_never_shorter_than_people_read():
    fast = msgspec.structs.replace(
        FACTS, latency=msgspec.structs.replace(SPEED, step_fixed_s=1e-3, step_per_sequence_s=0.0)
    )
    assert slo(turns(), fleet(num_both=1, facts=fast)).tpot_s == 0.025


def test_the_prompt_an_slo_is_made_for_is_one_of_the_shorter_nine_tenths():
    mixed = [*turns(count=9), *turns(count=1, prompt_tokens=20_000)]
    assert slo(mixed, fleet(num_both=1)).ttft_s == pytest.approx(0.55)
    assert np.isclose(alone_s(FACTS, 20_000), 2.2)
