"""The decision of `--autorole`: when a role changes, which worker's, and when none does."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planes.wire.messages import LatencyPrior, Role, WorkerId, WorkerState
from router.load import ModelLoad
from router.role_need import Need, need
from router.roles import RoleGoals, RolePlanner, Verdict
from router.stats import WorkerStatus
from tests.fakes import FACTS, registration

PREFILL, DECODE, BOTH = Role.PREFILL, Role.DECODE, Role.BOTH
WINDOW_S, HORIZON_S = 60.0, 600.0
ENGINE = msgspec.structs.replace(FACTS, block_size=512, num_blocks=1000, max_batch=128, max_step_tokens=2048)


def worker(name, role=BOTH, *, roles=tuple(Role), becoming=None, is_pinned=False, **fields):
    made = registration(name, role, **fields)
    return msgspec.structs.replace(made, roles=roles, becoming=becoming, is_pinned=is_pinned, facts=ENGINE)


def status(of, *, num_running=0, waiting_prefill_tokens=0):
    return WorkerStatus(
        worker=of.worker,
        role=of.role,
        model=of.model,
        state=of.state,
        num_running=num_running,
        num_waiting=0,
        waiting_prefill_tokens=waiting_prefill_tokens,
        queue_s=0.0,
        kv_tokens=0,
        free_blocks=0,
        num_blocks=0,
        indexed_blocks=0,
        is_exact=True,
        utilisation=0.0,
        speed=1.0,
        reported_s=0.0,
        latency=LatencyPrior(),
        num_samples=1,
    )


def load(rate, prompt_tokens, answer_tokens, *, attainment=None, slo_itl_s=0.025, arrived=None, stream_s=10.0):
    """A window of equal requests. rate: ended a second.  arrived: a second, if not as many."""
    ended, tokens = rate * WINDOW_S, answer_tokens - 1
    begun = ended if arrived is None else arrived * WINDOW_S
    return ModelLoad(
        arrived=begun,
        arrived_tokens=begun * prompt_tokens,
        ended=ended,
        prompt_tokens=ended * prompt_tokens,
        uncached_tokens=ended * prompt_tokens,
        pairs=ended * prompt_tokens**2 / 2,
        streams=ended,
        stream_tokens=ended * tokens,
        stream_kv_tokens=ended * tokens * (prompt_tokens + answer_tokens / 2),
        stream_s=ended * stream_s,
        judged=ended if attainment is not None else 0.0,
        good=ended * (attainment or 0.0),
        with_itl=begun,
        slo_itl_s=begun * slo_itl_s,
    )


MORNING = (8, 8000, 40)
"""Long prompts with short answers: about nine workers' time of prompts, next to nothing of answers."""
EVENING = (25, 800, 400)
"""Short prompts with long answers: as many workers' time of answers, three of prompts."""


class World:
    """A fleet that does what it is asked, at once."""

    def __init__(self, *workers, goals=None):
        self.workers = {each.worker: each for each in workers}
        self.running = {}
        self.planner = RolePlanner(goals or RoleGoals(WINDOW_S, HORIZON_S))
        self.now = 0.0
        self.changes = []

    def decide(self, wanted, **fields):
        self.now += WINDOW_S
        statuses = [status(each, num_running=self.running.get(each.worker, 0)) for each in self.workers.values()]
        window = wanted if isinstance(wanted, ModelLoad) else load(*wanted, **fields)
        (decision,) = self.planner.decide(self.workers.values(), statuses, {"sim": window}, now=self.now)
        return decision

    def window(self, wanted, **fields):
        decision = self.decide(wanted, **fields)
        if (change := decision.change) is not None:
            self.planner.asked("sim", change, now=self.now)
            self.changes.append((self.now, change))
            own = self.workers[change.worker]
            assert (own.epoch, own.role) == (change.epoch, change.before)
            self.workers[change.worker] = msgspec.structs.replace(own, role=change.role)
        return decision

    @property
    def num_prefill(self):
        return sum(not each.takes_answers for each in self.workers.values())


def fleet(num_prefill, num_both, **fields):
    roles = [PREFILL] * num_prefill + [BOTH] * num_both
    return World(*(worker(f"w{number:02}", role) for number, role in enumerate(roles)), **fields)


# --- what a load needs -----------------------------------------------------------------------------------------------


def test_a_load_needs_the_seconds_of_its_prompts_and_of_its_answers():
    morning, evening = need(load(*MORNING), ENGINE, WINDOW_S), need(load(*EVENING), ENGINE, WINDOW_S)
    assert morning.prefill == pytest.approx(8 * (8000 / 8000 + 2e-9 * 8000**2 / 2 + 0.01 * 8000 / 2048))
    assert morning.decode < 0.2 * evening.decode
    assert 2 < evening.prefill < 3


def test_what_arrives_and_is_not_served_counts_too():
    assert need(load(4, 8000, 40, arrived=8), ENGINE, WINDOW_S).prefill == pytest.approx(
        need(load(8, 8000, 40), ENGINE, WINDOW_S).prefill
    )


def test_what_is_cached_needs_no_seconds():
    cached = msgspec.structs.replace(load(*MORNING), uncached_tokens=0.0, pairs=0.0)
    assert need(cached, ENGINE, WINDOW_S).prefill < 0.1


def test_prompts_alone_may_be_computed_anywhere():
    alone = need(load(8, 8000, 1), ENGINE, WINDOW_S)
    assert alone.pressure(0, 12) == pytest.approx(alone.pressure(11, 1))


def test_workers_that_decode_have_less_time_for_prompts_the_tighter_the_slo():
    tight, loose = (need(load(*MORNING, slo_itl_s=each), ENGINE, WINDOW_S) for each in (0.012, 0.05))
    assert tight.pressure(0, 12) > loose.pressure(0, 12)
    assert tight.pressure(6, 6) < tight.pressure(0, 12), "a worker that only prefills has all of its time for them"


def test_one_more_worker_that_prefills_may_be_one_too_few_that_decode():
    evening = need(load(*EVENING), ENGINE, WINDOW_S)
    assert evening.pressure(10, 2) > evening.pressure(6, 6)
    assert Need(1.0, 1.0).pressure(3, 0) == float("inf")


# --- the rules -------------------------------------------------------------------------------------------------------


def test_more_workers_only_prefill_in_the_morning_and_decode_too_in_the_evening():
    world = fleet(1, 11)
    for _ in range(60):
        world.window(MORNING, attainment=0.7)
    morning = world.num_prefill
    assert morning > 3
    for _ in range(60):
        world.window((40, 800, 600), attainment=0.7)
    assert world.num_prefill < morning
    assert {change.role for _, change in world.changes} == {PREFILL, BOTH}


def test_a_change_has_to_be_wanted_in_two_windows_and_is_waited_for():
    world = fleet(1, 11)
    assert world.window(MORNING, attainment=0.7).code is Verdict.ONCE_MORE
    decision = world.window(MORNING, attainment=0.7)
    assert (decision.code, decision.change.before, decision.change.role) == (Verdict.CHANGE, BOTH, PREFILL)
    changed = decision.change.worker
    world.workers[changed] = msgspec.structs.replace(world.workers[changed], role=BOTH, becoming=PREFILL)
    for _ in range(5):
        assert world.window(MORNING, attainment=0.7).code is Verdict.CHANGING
    world.workers[changed] = msgspec.structs.replace(world.workers[changed], role=PREFILL, becoming=None)
    codes = [world.window(MORNING, attainment=0.7).code for _ in range(4)]
    assert codes == [Verdict.COOLING, Verdict.CHANGE, Verdict.COOLING, Verdict.CHANGE], "two in a row want the same"


def test_one_window_that_is_other_than_the_rest_changes_nothing():
    world = fleet(1, 11)
    for _ in range(10):
        world.window(MORNING, attainment=0.7)
        world.window((1, 800, 40), attainment=1.0)
    assert world.changes == []


def test_a_worker_that_never_answers_is_waited_for_no_longer_than_a_window():
    world = fleet(1, 11)
    world.decide(MORNING, attainment=0.7)
    decision = world.decide(MORNING, attainment=0.7)
    world.planner.asked("sim", decision.change, now=world.now)
    codes = [world.decide(MORNING, attainment=0.7).code for _ in range(2)]
    assert codes == [Verdict.COOLING, Verdict.CHANGE]


def test_the_worker_with_the_fewest_answers_to_end_is_taken():
    world = fleet(1, 3)
    world.running = {WorkerId("w01"): 9, WorkerId("w02"): 2, WorkerId("w03"): 5}
    world.window((3, 8000, 40), attainment=0.7)
    assert world.window((3, 8000, 40), attainment=0.7).change.worker == "w02"


def test_while_the_slo_is_kept_or_the_fleet_is_calm_nothing_changes():
    world = fleet(1, 11)
    assert world.window((4, 8000, 40), attainment=0.995).code is Verdict.SLO_KEPT
    assert world.window((2, 8000, 40)).code is Verdict.ENOUGH
    assert world.window((8 / 60, 8000, 40), attainment=0.0).code is Verdict.NO_LOAD


def test_an_overload_of_any_size_is_worth_a_change():
    world = fleet(1, 11)
    world.window((80, 8000, 40), attainment=0.0)
    assert world.window((80, 8000, 40), attainment=0.0).change is not None


def test_a_change_that_does_not_pay_within_the_horizon_is_not_made():
    soon = RoleGoals(WINDOW_S, horizon_s=5.0)
    world = fleet(1, 11, goals=soon)
    decisions = [world.window(MORNING, attainment=0.7, stream_s=50.0) for _ in range(4)]
    assert {decision.code for decision in decisions} == {Verdict.TOO_DEAR}
    assert "worker-seconds in 5 s and costs 52" in decisions[0].reason


def test_pinned_and_unable_workers_are_left_alone():
    others = [worker("pinned", is_pinned=True), worker("fixed", roles=()), worker("part", roles=(DECODE, BOTH))]
    world = World(*others, worker("alone", mode=None), worker("p", PREFILL))
    assert {world.window((3, 8000, 40), attainment=0.5).code for _ in range(4)} == {Verdict.NOBODY}
    free = World(*others, worker("free"), worker("p", PREFILL))
    free.window((3, 8000, 40), attainment=0.5)
    assert free.window((3, 8000, 40), attainment=0.5).change.worker == "free"


def test_a_fleet_of_fixed_workers_and_one_of_embedders_is_nobodys_business():
    fixed = worker("fixed", roles=())
    vectors = msgspec.structs.replace(
        worker("e"), model="vectors", facts=msgspec.structs.replace(ENGINE, embedding_size=9)
    )
    planner = RolePlanner(RoleGoals())
    assert planner.decide([fixed, vectors], [status(fixed), status(vectors)], {}, now=0.0) == []


def test_what_falls_below_the_floor_is_mended_at_once():
    world = World(worker("p0", PREFILL), worker("p1", PREFILL), worker("p2", PREFILL, is_pinned=True))
    decision = world.window(MORNING)
    assert (decision.code, decision.change.worker, decision.change.role) == (Verdict.FLOOR, "p0", BOTH)
    world = World(worker("d0", DECODE), worker("d1", DECODE))
    decision = world.window(EVENING)
    assert (decision.code, decision.change.worker, decision.change.role) == (Verdict.FLOOR, "d0", BOTH)


def test_workers_that_stop_or_say_nothing_do_not_count():
    world = World(worker("p", PREFILL), worker("a"), worker("b", state=WorkerState.DRAINING))
    assert {world.window((3, 8000, 40), attainment=0.5).code for _ in range(3)} == {Verdict.BEST}


def test_the_change_before_is_not_undone_within_the_horizon_for_much_the_same_load():
    world = fleet(1, 11)
    world.window(MORNING, attainment=0.7)
    assert world.window(MORNING, attainment=0.7).change is not None
    past = world.planner._pasts["sim"]
    past.is_more_prefill, past.need = False, need(load(*MORNING), ENGINE, WINDOW_S)
    world.window(MORNING, attainment=0.7)
    assert world.window(MORNING, attainment=0.7).code is Verdict.TURNS_BACK
    assert world.window((12, 8000, 40), attainment=0.7).code is Verdict.ONCE_MORE, "that is another load"


# --- whatever the load does -------------------------------------------------------------------------------------------


loads = st.builds(
    load,
    st.floats(0.5, 60),
    st.integers(10, 30_000),
    st.integers(1, 2000),
    attainment=st.none() | st.floats(0, 1),
    slo_itl_s=st.floats(0.009, 0.2),
    arrived=st.none() | st.floats(0.5, 100),
)


@settings(max_examples=60, deadline=None)
@given(
    windows=st.lists(loads, min_size=1, max_size=60),
    roles=st.lists(st.sampled_from(Role), min_size=2, max_size=8),
    min_prefill=st.integers(1, 3),
    min_decode=st.integers(1, 3),
)
def test_the_floor_is_held_whatever_the_load_does(windows, roles, min_prefill, min_decode):
    goals = RoleGoals(WINDOW_S, HORIZON_S, min_prefill, min_decode)
    world = World(*(worker(f"w{number}", role) for number, role in enumerate(roles)), goals=goals)
    least_prefill = least_decode = 0
    for window in windows:
        world.window(window)
        prefilling = sum(each.takes_prompts for each in world.workers.values())
        decoding = sum(each.takes_answers for each in world.workers.values())
        # Once reached, never given up.
        assert prefilling >= min(least_prefill, min_prefill)
        assert decoding >= max(1 if least_decode else 0, min(least_decode, min_decode))
        least_prefill, least_decode = max(least_prefill, prefilling), max(least_decode, decoding)
    changed_at = [at for at, _ in world.changes]
    repairs = len(roles)
    assert len(changed_at) <= repairs + len(windows) / 2, "one at a time, and not in every window"


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(1, 20),
    prompt_tokens=st.integers(100, 12_000),
    answer_tokens=st.integers(2, 800),
    attainment=st.none() | st.floats(0.0, 0.98),
    num_prefill=st.integers(0, 10),
    seed=st.integers(0, 2**32),
)
def test_a_steady_load_with_noise_settles_and_never_turns_back_within_the_horizon(
    rate, prompt_tokens, answer_tokens, attainment, num_prefill, seed
):
    rng, world = random.Random(seed), fleet(num_prefill, 12 - num_prefill)
    for _ in range(120):

        def noisy(value):
            return value * rng.uniform(0.94, 1.06)

        world.window(
            load(
                noisy(rate),
                max(1, round(noisy(prompt_tokens))),
                max(2, round(noisy(answer_tokens))),
                attainment=attainment,
            )
        )
    for (before_at, before), (at, change) in zip(world.changes, world.changes[1:], strict=False):
        is_back = (before.role is PREFILL) is not (change.role is PREFILL)
        assert not is_back or at - before_at > HORIZON_S
    late = [at for at, _ in world.changes if at > 60 * WINDOW_S]
    assert len(late) <= 60 * WINDOW_S / HORIZON_S, "at most one for each horizon"
