"""A worker's prompts as steps: against an engine that composes them, and against what comes late or never."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.steps import Pace, StepPlan

PACE = Pace(fixed_s=0.01, budget=100)
PER_TOKEN_S = 0.001


class Engine:
    """Computes prompts in turn, in steps, as real engines do."""

    def __init__(self):
        self.ends_at, self.left, self.in_step, self.num_computed = 0.0, [], 0, 0

    def add(self, tokens, now):
        self.left.append(tokens)
        if self.ends_at <= now and not self.in_step:
            self._begin(now)

    def _begin(self, now):
        self.in_step = min(PACE.budget, sum(self.left))
        self.ends_at = now + PACE.fixed_s + PER_TOKEN_S * self.in_step

    def advance(self, now):
        while self.in_step and self.ends_at <= now:
            budget, self.in_step = self.in_step, 0
            while self.left and budget:
                done = min(budget, self.left[0])
                budget -= done
                self.left[0] -= done
                if not self.left[0]:
                    del self.left[0]
            if self.left:
                self._begin(self.ends_at)


def add(plan, tokens, now=0.0):
    plan.add(tokens, tokens * PER_TOKEN_S, now, PACE)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 350)), min_size=1, max_size=20))
def test_the_plan_is_what_an_engine_does(arrivals):
    plan, engine, now = StepPlan(), Engine(), 0.0
    for pause_s, tokens in arrivals:
        now += pause_s
        plan.advance(now, PACE)
        engine.advance(now)
        left = sum(engine.left)
        assert plan.ready_tokens == left - engine.in_step
        if engine.in_step:
            assert plan.ends_at == pytest.approx(engine.ends_at)
            full = (left - engine.in_step) // PACE.budget
            assert plan.starts_in_s(now, PACE) == pytest.approx(
                engine.ends_at - now + full * (PACE.fixed_s + PACE.budget * PER_TOKEN_S)
            )
        else:
            assert plan.starts_in_s(now, PACE) == 0.0
        add(plan, tokens, now)
        engine.add(tokens, now)


def late_in_s(plan, ends_at):
    _, _, num_sharing = plan.shared(PACE)
    return plan.late_in_s(ends_at, num_sharing)


def test_how_much_longer_a_step_may_get_is_told_by_who_is_due_first_in_it():
    plan = StepPlan()
    plan.add(50, 0.05, 0.0, PACE, 0.01)  # begins at once
    for tokens, due_at in ((20, 0.30), (20, 0.25), (20, math.inf), (20, 0.05)):
        plan.add(tokens, tokens * PER_TOKEN_S, 0.0, PACE, due_at)
    assert late_in_s(plan, 0.15) == pytest.approx(0.10)
    assert late_in_s(plan, 0.26) == pytest.approx(0.04)  # one is late anyway
    assert late_in_s(plan, 0.31) == math.inf
    plan.add(30, 0.03, 0.0, PACE, 0.9)  # ends in the step after that one
    assert late_in_s(plan, 0.15) == pytest.approx(0.75)
    plan.advance(0.06, PACE)
    assert late_in_s(plan, 0.15) == pytest.approx(0.75)
    plan.advance(0.2, PACE)
    plan.add(10, 0.01, 0.2, PACE, 0.8)
    assert late_in_s(plan, 0.3) == pytest.approx(0.5)


def test_a_step_is_not_short_of_time_for_prompts_that_are_computed_before_it():
    plan = StepPlan()
    plan.add(50, 0.05, 0.0, PACE)  # begins at once
    for due_at in (0.20, 0.20, 0.90):
        plan.add(20, 0.02, 0.0, PACE, due_at)
    plan.advance(0.06, PACE)  # they begin together, as far as anybody knows …
    plan.report(40, 0.04, 20, 0.02, 3, 0.07, PACE)  # … and the third one came too late for that
    assert plan.shared(PACE) == (20, pytest.approx(0.02), 1)
    assert late_in_s(plan, 0.15) == pytest.approx(0.75)


def test_what_a_step_is_due_for_is_not_kept_longer_than_its_prompts():
    plan = StepPlan()
    plan.add(50, 0.05, 0.0, PACE)
    for number in range(1000):  # something is left whenever another one comes
        plan.add(10, 0.01, 0.001, PACE, 1.0 + number)
        plan.report(20, 0.02, 10, 0.01, 3, 0.001, PACE)
    assert len(plan._due) <= 3


def test_prompts_taken_to_be_in_a_step_that_ended_without_them_begin_when_it_ends():
    plan = StepPlan()
    add(plan, 10)
    add(plan, 40)
    add(plan, 20)
    plan.advance(0.021, PACE)  # both begin at 0.02, as far as anybody knows
    assert (plan.step_tokens, plan.ends_at) == (60, pytest.approx(0.09))
    add(plan, 30, 0.03)
    plan.done(50, 0.07, PACE)  # the first alone was in it
    assert (plan.step_tokens, plan.ready_tokens) == (50, 0)
    assert plan.ends_at == pytest.approx(0.07 + PACE.fixed_s + 0.05)
    plan.done(30, 0.07, PACE)  # and so was the second one
    assert plan.ends_at == pytest.approx(0.07 + PACE.fixed_s + 0.03)


def test_what_is_left_of_a_full_step_may_be_a_prompt_that_goes_on():
    plan = StepPlan()
    for tokens in (10, 40, 200):
        add(plan, tokens)
    plan.advance(0.021, PACE)
    assert (plan.step_tokens, plan.ready_tokens, plan.ends_at) == (100, 140, pytest.approx(0.13))
    plan.done(200, 0.12, PACE)
    assert (plan.step_tokens, plan.ready_tokens, plan.ends_at) == (60, 140, pytest.approx(0.13))


def test_a_report_leaves_the_step_in_progress_as_it_is_planned():
    plan = StepPlan()
    add(plan, 10)
    add(plan, 40)
    plan.advance(0.021, PACE)
    add(plan, 30, 0.03)
    plan.report(70, 0.07, 0, 0.0, 2, 0.04, PACE)
    assert (plan.step_tokens, plan.ready_tokens, plan.ends_at) == (40, 30, pytest.approx(0.07))
    plan.report(20, 0.02, 0, 0.0, 1, 0.05, PACE)  # less is left than that step has
    assert (plan.step_tokens, plan.ready_tokens, plan.ends_at) == (20, 0, pytest.approx(0.07))


def test_what_is_in_the_step_that_a_prompt_would_join_is_told():
    plan = StepPlan()
    for tokens in (50, 100, 20, 20):
        add(plan, tokens)
    tokens, work_s, num_sharing = plan.shared(PACE)
    assert (tokens, work_s) == (40, pytest.approx(0.04))
    assert num_sharing >= 1


def test_a_plan_that_is_behind_catches_up_with_what_is_computed():
    plan = StepPlan()
    for _ in range(3):
        add(plan, 100)
    plan.done(200, 0.05, PACE)  # the first is computed, and was predicted to take until 0.11
    assert (plan.step_tokens, plan.ready_tokens) == (100, 100)
    assert plan.ends_at == pytest.approx(0.05 + 0.11)


def test_a_plan_that_is_ahead_learns_when_the_step_really_began():
    plan = StepPlan()
    add(plan, 100)
    add(plan, 100)
    plan.done(100, 0.15, PACE)  # 0.04 s later than predicted
    assert plan.ends_at == pytest.approx(0.15 + 0.11)


def test_a_report_puts_a_step_that_nobody_saw_begin_half_way():
    plan = StepPlan()
    plan.report(250, 0.25, 0, 0.0, 3, 1.0, PACE)
    assert plan.ends_at == pytest.approx(1.0 + 0.055)
    assert (plan.step_tokens, plan.ready_tokens, plan.ready_s) == (100, 150, pytest.approx(0.15))


def test_a_report_leaves_a_step_that_is_planned_as_it_is():
    plan = StepPlan()
    add(plan, 100, 1.0)
    plan.report(100, 0.1, 0, 0.0, 1, 1.03, PACE)
    assert plan.ends_at == pytest.approx(1.11)
    plan = StepPlan()
    add(plan, 100, 1.0)
    plan.report(0, 0.0, 100, 0.1, 1, 1.03, PACE)  # sent too late for the report
    assert (plan.ends_at, plan.ready_tokens) == (pytest.approx(1.11), 0)
    plan.report(0, 0.0, 0, 0.0, 0, 1.05, PACE)
    assert plan.starts_in_s(1.05, PACE) == 0.0


def test_streams_stand_still_for_the_work_and_not_for_steps_that_they_would_have_had():
    plan = StepPlan()
    add(plan, 100)
    add(plan, 150)
    assert plan.stall_s(PACE, 0.01) == pytest.approx(0.1 + 0.15)
    assert plan.stall_s(PACE, 0.004) == pytest.approx(0.1 + 0.15 + 3 * 0.006)


def test_a_stall_counts_from_when_it_begins_until_a_report_tells_of_it():
    plan = StepPlan()
    add(plan, 100)
    add(plan, 100)
    assert plan.past_stall_s(0.0, 0.01) == 0.0
    plan.advance(0.05, PACE)
    assert plan.stall_s(PACE, 0.01) == pytest.approx(0.2)  # the part of the step that is over is not forgotten
    assert plan.past_stall_s(0.05, 0.01) == pytest.approx(0.05)
    plan.advance(1.0, PACE)
    assert plan.stall_s(PACE, 0.01) == plan.past_stall_s(1.0, 0.01) == pytest.approx(0.2)
    plan.report(0, 0.0, 0, 0.0, 0, 1.0, PACE)
    assert plan.stall_s(PACE, 0.01) == 0.0


def test_a_step_that_is_over_sooner_than_planned_stalled_for_no_longer():
    plan = StepPlan()
    add(plan, 100)
    plan.clear(0.05)
    assert plan.stall_s(PACE, 0.01) == pytest.approx(0.04)


@pytest.mark.parametrize("pace", [Pace(0.0, 1), Pace(1e-30, 1), Pace(1e-9, 1), Pace(0.01, 2048)])
@pytest.mark.parametrize("now", [0.0, 5.0, 1e9])
def test_whatever_a_worker_reports_its_plan_goes_on_at_once(pace, now):
    plan = StepPlan()
    plan.report(1 << 48, 0.0, 1 << 48, 0.0, 1 << 40, 0.0, pace)
    plan.advance(now, pace)
    plan.add(1 << 40, 0.0, now, pace)
    plan.done(1, now, pace)
    plan.advance(now + 1e9, pace)
    assert plan.ready_tokens >= 0
    assert plan.ready_s >= 0.0
    assert plan.starts_in_s(now + 1e9, pace) >= 0.0
