"""`--autorole` in a simulated fleet: the gateway's own `RolePlanner` on virtual time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loadtest.simulator.simulation import Simulation
from planes.wire.messages import EngineFacts, Role, WorkerId
from router.load import ModelLoad, since, together
from router.role_need import Need, need
from router.roles import RoleDecision, RoleGoals, RolePlanner

_CALM: Final = 0.8
"""Pressure up to which a fleet is as large as it need be."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A worker was asked for a role."""

    at_s: float
    worker: WorkerId
    role: Role
    reason: str


class SimulatedAutorole:
    """Looks on for a whole run, window after window, and changes roles if it is told to. Make it before `run`."""

    def __init__(self, simulation: Simulation, goals: RoleGoals, *, is_acting: bool) -> None:
        self.changes: list[Changed] = []
        self.decisions: list[RoleDecision] = []
        self.spare_s = 0.0
        """Workers' seconds that a fleet of the best split could have done without, by the formula, a whole worker at a
        time."""
        self._simulation, self._is_acting = simulation, is_acting
        self._planner = RolePlanner(goals)
        self._before = self._loads()
        self._plan()

    def _plan(self) -> None:
        self._simulation.clock.call_later(self._planner.goals.window_s, self._window_ended)

    def _loads(self) -> dict[str, ModelLoad]:
        return together([gateway.router.loads() for gateway in self._simulation.gateways])

    def _window_ended(self) -> None:
        simulation, planner = self._simulation, self._planner
        now, loads = simulation.clock.now, self._loads()
        window, self._before = since(loads, self._before), loads
        lives = [life.registration for life in simulation.lives.values() if life.is_alive]
        if not lives:  # nobody to change, nor to spare
            self._plan()
            return
        statuses = simulation.gateways[0].router.workers(now=now)
        self._count_spare(window, len(lives), lives[0].facts)
        for decision in planner.decide(lives, statuses, window, now=now):
            self.decisions.append(decision)
            if self._is_acting and (change := decision.change) is not None:
                simulation.change_role(change.worker, change.role, planner.goals.window_s)
                planner.asked(decision.model, change, now=now)
                self.changes.append(Changed(now, change.worker, change.role, decision.reason))
        self._plan()

    def _count_spare(self, window: Mapping[str, ModelLoad], num_workers: int, facts: EngineFacts) -> None:
        goals, wanted = self._planner.goals, 1
        for load in window.values():
            if load.ended:
                wanted = fewest(need(load, facts, goals.window_s), num_workers)
        self.spare_s += (num_workers - wanted) * goals.window_s


def fewest(needed: Need, most: int) -> int:
    """Workers that bear a load calmly in their best split; `most` if none do."""
    return next((count for count in range(1, most) if _pressure(needed, count) <= _CALM), most)


def _pressure(needed: Need, count: int) -> float:
    return min((needed.pressure(number, count - number) for number in range(count)), default=math.inf)
