import random
import statistics
from dataclasses import replace

import numpy as np
import pytest

from loadtest.grid.axes import AXES, Cell, sample
from loadtest.grid.loads import TOOL_S, TURNS, diurnal_starts, gamma_starts, poisson_starts, setup
from loadtest.grid.named import NAMED

PLAIN = Cell(3, 8_000, 10, "1k", 16, "poisson", "none", "both", 0.9, "in turn")


def cell(**values):
    return replace(PLAIN, **values)


def turns(drawn):
    return [turn for session in drawn.workload.sessions for turn in session.turns]


def first_block(turn):
    return turn.blocks[0]


@pytest.mark.parametrize("number", [0, 4, 9, 17])
def test_a_cell_is_drawn_equally_for_one_seed(number):
    one = sample(number + 1, 1)[-1]
    first, second = setup(one, 1), setup(one, 1)
    assert [session.start_s for session in first.workload.sessions] == [s.start_s for s in second.workload.sessions]
    assert all(np.array_equal(a.blocks, b.blocks) for a, b in zip(turns(first), turns(second), strict=True))
    assert first.slo == second.slo


@pytest.mark.parametrize("axis", AXES)
def test_every_value_of_an_axis_can_be_drawn_and_fits_its_engine(axis):
    for value in AXES[axis]:
        drawn = setup(cell(**{axis: value}), 0)
        facts = drawn.scenario.facts
        assert max(turn.prompt_tokens + turn.completion_tokens for turn in turns(drawn)) <= facts.context_length
        assert facts.num_blocks * facts.block_size >= facts.context_length


@pytest.mark.parametrize(("prompts", "mean"), [("100", 100), ("1k", 1_000), ("8k", 8_000), ("60k", 60_000)])
def test_prompts_are_drawn_about_the_length_asked_for(prompts, mean):
    lengths = [turn.prompt_tokens for turn in turns(setup(cell(prompts=prompts), 0))]
    assert statistics.fmean(lengths) == pytest.approx(mean, rel=0.05)
    assert min(lengths) < 0.8 * mean < 1.2 * mean < max(lengths)


@pytest.mark.parametrize("answers", [16, 300, 2_000])
def test_answers_are_drawn_about_the_length_asked_for(answers):
    lengths = [turn.completion_tokens for turn in turns(setup(cell(answers=answers), 0))]
    assert statistics.fmean(lengths) == pytest.approx(answers, rel=0.1)
    assert min(lengths) < 0.5 * answers
    assert max(lengths) > 1.5 * answers


def test_arrivals_have_the_share_of_the_capacity_that_the_cell_names():
    drawn = setup(cell(), 0)
    rate = len(turns(drawn)) / drawn.workload.sessions[-1].start_s
    assert rate == pytest.approx(0.9 * drawn.estimate.requests_per_s, rel=0.01)


def test_a_closed_loop_has_the_clients_that_the_load_asks_for():
    drawn = setup(cell(arrivals="closed"), 0)
    assert drawn.workload.num_clients == drawn.estimate.clients(0.9)
    assert {turn.think_s for turn in turns(drawn)} == {0.0}
    assert setup(cell(), 0).workload.num_clients is None


def test_every_client_of_a_closed_loop_has_more_than_one_session():
    few = cell(arrivals="closed", prompts="60k", answers=2_000, sharing="sessions", prefill=100_000, step_ms=30)
    drawn = setup(few, 0)
    assert len(drawn.workload.sessions) > 1.5 * drawn.workload.num_clients


@pytest.mark.parametrize(("sharing", "share"), [("none", 0), ("half", 0.5), ("95%", 0.95)])
def test_requests_share_as_much_of_their_prompts_as_the_cell_names(sharing, share):
    drawn = setup(cell(sharing=sharing, prompts="8k"), 0)
    size = drawn.scenario.facts.block_size
    seen, shared, tokens = set(), 0, 0
    for turn in turns(drawn):
        names = turn.blocks.tolist()
        shared += size * sum(name in seen for name in names)
        tokens += turn.prompt_tokens
        seen.update(names)
    assert shared / tokens == pytest.approx(share, abs=0.04)


def test_a_session_has_pauses_and_keeps_its_past_in_the_prompt():
    drawn = setup(cell(sharing="sessions", prompts="8k", load=0.5), 0)
    session = drawn.workload.sessions[0]
    assert len(session.turns) == TURNS
    first, second = session.turns[:2]
    size = drawn.scenario.facts.block_size
    kept = (first.prompt_tokens + first.completion_tokens) // size
    assert np.array_equal(first.blocks[:kept], second.blocks[:kept])
    pauses = [turn.think_s for each in drawn.workload.sessions for turn in each.turns[1:]]
    assert statistics.fmean(pauses) == pytest.approx(TOOL_S, rel=0.2)


def test_pauses_are_shorter_where_all_is_over_in_a_few_seconds():
    drawn = setup(cell(sharing="sessions", prompts="100", prefill=100_000, step_ms=2), 0)
    span = drawn.workload.sessions[-1].start_s
    assert statistics.fmean(turn.think_s for each in drawn.workload.sessions for turn in each.turns[1:]) < span / 5


def test_a_slow_engine_serves_fewer_requests():
    drawn = setup(cell(prompts="60k", prefill=2_000, answers=2_000, step_ms=30), 0)
    assert len(turns(drawn)) < len(turns(setup(cell(prompts="60k"), 0)))


@pytest.mark.parametrize(("starts", "cv", "slack"), [(poisson_starts, 1.0, 0.1), (gamma_starts, 10.0, 0.25)])
def test_gaps_have_the_coefficient_of_variation_of_their_arrivals(starts, cv, slack):
    gaps = np.diff([0.0, *starts(20_000, 50.0, random.Random(1))])
    assert gaps.mean() == pytest.approx(1 / 50)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=slack)


def test_a_day_has_a_quiet_night_and_a_busy_noon():
    starts = diurnal_starts(10_000, 100.0, random.Random(1))
    assert starts == sorted(starts)
    night = sum(at < 10 for at in starts) + sum(at >= 90 for at in starts)
    noon = sum(40 <= at < 60 for at in starts)
    assert 6 < noon / night < 9


def test_fast_engines_take_more_tokens_a_step_and_share_what_a_step_costs():
    slow, fast = (setup(cell(prefill=prefill), 0).scenario.facts for prefill in (8_000, 30_000))
    assert (slow.max_step_tokens, fast.max_step_tokens) == (2048, 8192)
    assert fast.latency.prefill_per_pair_s / fast.latency.prefill_per_token_s == pytest.approx(
        slow.latency.prefill_per_pair_s / slow.latency.prefill_per_token_s
    )


def test_fleets_are_what_their_names_say():
    fleets = {name: setup(cell(fleet=name), 0).scenario for name in AXES["fleet"]}
    assert (fleets["1+3"].num_prefill, fleets["1+3"].num_decode) == (1, 3)
    assert (fleets["slow both"].slow_worker, fleets["slow both"].num_both) == (2.0, 4)
    assert (fleets["2 gateways 2+2"].num_gateways, fleets["2 gateways 2+2"].num_prefill) == (2, 2)


def test_engines_tell_in_which_order_they_compute():
    assert setup(cell(order="shortest first"), 0).scenario.facts.is_shortest_first
    assert not setup(cell(), 0).scenario.facts.is_shortest_first


@pytest.mark.parametrize("name", NAMED)
def test_a_named_regime_is_what_its_name_says(name):
    drawn = NAMED[name](0)
    assert drawn.name == name
    assert drawn.workload.num_requests >= 1500
    assert drawn.workload.block_size == drawn.scenario.facts.block_size
