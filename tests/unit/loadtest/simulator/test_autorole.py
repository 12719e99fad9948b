"""Workers change their roles in a simulated fleet: nothing is lost, and the production decision drives it."""

import numpy as np
import pytest

from loadtest.simulator.autorole import SimulatedAutorole, fewest
from loadtest.simulator.records import Ending
from loadtest.simulator.scenario import Faults, Kill, Scenario, engine_facts
from loadtest.simulator.simulation import Simulation
from loadtest.slo import Slo
from loadtest.workloads import Session, Turn, Workload
from planes.wire.messages import Role, WorkerId
from router.role_need import Need
from router.roles import RoleGoals

FACTS = engine_facts(block_size=64, num_blocks=4000, link_gbps=100)
SLO = Slo(1.0, 0.02)


def workload(count, every_s, prompt_tokens, answer_tokens):
    turn = Turn(0.0, prompt_tokens, answer_tokens, np.empty(0, np.uint64))
    return Workload("w", 64, tuple(Session(number * every_s, (turn,)) for number in range(count)))


def simulation(load, num_prefill=1, num_decode=0, num_both=2):
    fleet = Scenario(
        "headrace", num_prefill, num_decode, num_both, facts=FACTS, slo_ttft_s=SLO.ttft_s, slo_itl_s=SLO.tpot_s
    )
    return Simulation(fleet, load)


def role_at(run, at_s, worker):
    seen = []
    run.clock.call_at(at_s, lambda: seen.append((run.lives[worker].role, run.lives[worker].becoming)))
    return seen


@pytest.mark.parametrize("migrate_after_s", [0.0, 1000.0])
def test_a_worker_that_stops_decoding_ends_its_answers_or_moves_them(migrate_after_s):
    run, changed = simulation(workload(40, 0.05, 200, 600)), WorkerId("both-001")
    run.clock.call_at(3.0, run.change_role, changed, Role.PREFILL, migrate_after_s)
    meanwhile, soon, late = role_at(run, 3.5, changed), role_at(run, 4.5, changed), role_at(run, 25.0, changed)
    result = run.run()
    assert {record.ending for record in result.records} == {Ending.FINISHED}
    assert all(record.num_received == 600 for record in result.records)
    assert meanwhile == [(Role.BOTH, Role.PREFILL)]
    assert soon == [(Role.PREFILL, None) if not migrate_after_s else (Role.BOTH, Role.PREFILL)]
    assert late in ([(Role.PREFILL, None)], [])
    assert any(record.num_migrations for record in result.records) is not bool(migrate_after_s)


def test_a_worker_that_gives_nothing_up_has_its_new_role_at_once():
    run, changed = simulation(workload(40, 0.05, 200, 50)), WorkerId("prefill-000")
    run.clock.call_at(1.0, run.change_role, changed, Role.BOTH, 0.0)
    after = role_at(run, 1.0, changed)
    assert {record.ending for record in run.run().records} == {Ending.FINISHED}
    assert after == [(Role.BOTH, None)]


def test_the_production_decision_changes_roles_as_the_load_asks():
    goals = RoleGoals(window_s=5.0, horizon_s=50.0)
    for is_acting in (False, True):
        run = simulation(workload(250, 0.25, 4000, 20), num_prefill=0, num_both=3)
        autorole = SimulatedAutorole(run, goals, is_acting=is_acting)
        result = run.run()
        assert {record.ending for record in result.records} == {Ending.FINISHED}
        assert bool(autorole.changes) is is_acting
        assert {change.role for change in autorole.changes} <= {Role.PREFILL}
        assert 0 <= autorole.spare_s <= 3 * result.duration_s


def test_a_window_that_ends_without_any_worker_changes_and_counts_nothing():
    fleet = Scenario("headrace", 0, 0, 1, facts=FACTS, faults=Faults(kills=[Kill(3.0)], restart_s=8.0))
    run = Simulation(fleet, workload(40, 0.5, 200, 20))
    autorole = SimulatedAutorole(run, RoleGoals(window_s=2.0, horizon_s=20.0), is_acting=True)
    run.run()
    assert (autorole.changes, autorole.spare_s) == ([], 0.0)


def test_the_fewest_workers_bear_a_load_calmly():
    assert fewest(Need(1.0, 0.5), 8) == 2
    assert fewest(Need(3.0, 2.0, tokens_share=2.0), 8) == 6
    assert fewest(Need(30.0, 2.0), 8) == 8
