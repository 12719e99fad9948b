import statistics

import numpy as np
import pytest

from loadtest.plan import sample
from loadtest.workloads import Session, Turn, Workload


def workload(*starts, prompts=None):
    prompts = prompts or [100] * len(starts)
    empty = np.empty(0, np.uint64)
    sessions = (Session(at, (Turn(0.0, tokens, 10, empty),)) for at, tokens in zip(starts, prompts, strict=True))
    return Workload("w", 16, tuple(sessions))


def test_a_generated_load_has_the_rate_and_the_means_asked_for():
    found = sample.generated(5.0, 1000, 100, block_size=16, num_requests=3000, seed=1)
    turns = [session.turns[0] for session in found.sessions]
    assert sample.requests_per_s(found) == pytest.approx(5.0, rel=0.05)
    assert statistics.fmean(turn.prompt_tokens for turn in turns) == pytest.approx(1000, rel=0.05)
    assert statistics.fmean(turn.completion_tokens for turn in turns) == pytest.approx(100, rel=0.05)
    assert max(turn.prompt_tokens for turn in turns) <= 4000
    assert len({int(turn.blocks[0]) for turn in turns if len(turn.blocks)}) > 2900


def test_answers_of_one_token_stay_so():
    found = sample.generated(5.0, 1000, 1, block_size=16, num_requests=50, seed=1)
    assert {session.turns[0].completion_tokens for session in found.sessions} == {1}


def test_the_busiest_part_of_a_trace_is_taken_and_begins_at_once():
    starts = [float(at) for at in range(100)] + [100 + at / 10 for at in range(40)] + [200.0 + at for at in range(60)]
    found = sample.busiest(workload(*starts), 40)
    assert len(found.sessions) == 40
    assert found.sessions[0].start_s == 0.0
    assert found.sessions[-1].start_s == pytest.approx(3.9)


def test_busy_is_told_by_tokens_not_by_requests():
    starts = [float(at) for at in range(80)]
    found = sample.busiest(workload(*starts, prompts=[10] * 40 + [10_000] * 40), 40)
    assert {session.turns[0].prompt_tokens for session in found.sessions} == {10_000}


def test_a_short_trace_is_taken_whole():
    whole = workload(0.0, 1.0, 2.0)
    assert sample.busiest(whole, 40) is whole
