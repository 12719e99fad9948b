"""One workload served by one simulated fleet."""

import random
from collections.abc import Callable, Sequence
from typing import Final

from loadtest.simulator.clock import Clock
from loadtest.simulator.driver import SimulatedDriver, gateway_request
from loadtest.simulator.gateway import SimulatedGateway, default_router
from loadtest.simulator.records import Ending, Gaps, Record, Result, WorkerTotals
from loadtest.simulator.scenario import Kill, Scenario
from loadtest.simulator.worker import SimulatedWorker
from loadtest.workloads import Session, Workload
from planes.wire.messages import RequestId, Role, WorkerId
from router.router import Router
from workers.publications import BUSY_REPORT_S

MakeRouter = Callable[[Scenario, int], Router]
"""Scenario and number of the gateway → its router."""

GiveUp = Callable[[Sequence[Record], float], bool]
"""Records of all that was sent, and now → whether the rest is not worth serving."""

_FIRST_EPOCH: Final = 1
_ASKED_EVERY_S: Final = 1.0


class Simulation:
    """Good for one `run`."""

    def __init__(
        self,
        scenario: Scenario,
        workload: Workload,
        on_progress: Callable[[int, int], None] = lambda _ended, _all: None,
        *,
        make_router: MakeRouter = default_router,
        give_up: GiveUp | None = None,
    ) -> None:
        """give_up: asked once a second of the run's time; once it says so the run ends (`is_given_up`)."""
        self.scenario = scenario
        self.clock = Clock()
        self.lives: dict[WorkerId, SimulatedWorker] = {}
        """Of every worker the present one, or the last."""
        self.gateways = [
            SimulatedGateway(make_router(scenario, number), scenario, self.clock, number)
            for number in range(scenario.num_gateways)
        ]
        self._workload = workload
        self._on_progress = on_progress
        self._gaps = Gaps()
        self._records: list[Record] = []
        self._totals = {worker: WorkerTotals(worker, role) for worker, role in scenario.workers()}
        self._num_ended = self._num_started = 0
        self._give_up = give_up
        self.is_given_up = False
        self._faults_rng = scenario.rng("faults")

    def run(self) -> Result:
        """Serve it all, or as much as ends within `drain_s`."""
        self.start_workers()
        self._plan_kills()
        last, num_requests = self._plan_sessions(), self._workload.num_requests
        if self._give_up is not None:
            self.clock.call_later(_ASKED_EVERY_S, self._ask_whether_to_give_up, self._give_up)
        self.clock.run(
            until=last + self.scenario.drain_s, is_over=lambda: self.is_given_up or self._num_ended == num_requests
        )
        for record in self._records:
            record.ending = record.ending or Ending.UNFINISHED
        return Result(self._records, self._gaps, list(self._totals.values()), self.clock.now)

    def _ask_whether_to_give_up(self, give_up: GiveUp) -> None:
        self.is_given_up = give_up(self._records, self.clock.now)
        self.clock.call_later(_ASKED_EVERY_S, self._ask_whether_to_give_up, give_up)

    # --- workers -------------------------------------------------------------------------------------------------

    def start_workers(self) -> None:
        """Let all gateways know them, and each other, and begin to report. `run` does it."""
        for gateway in self.gateways:
            gateway.join(self.gateways)
        phases = random.Random(self.scenario.seed)
        for worker in self._totals:
            life = self._live(worker, _FIRST_EPOCH)
            for gateway in self.gateways:
                gateway.worker_up(life)
        for life in self.lives.values():
            life.publisher.start(life.core, phases.random() * BUSY_REPORT_S)

    def change_role(self, worker: WorkerId, role: Role, migrate_after_s: float) -> None:
        """Ask a worker; gateways hear of each step."""
        life = self.lives[worker]

        def tell() -> None:
            registration = life.registration
            for gateway in self.gateways:
                self.clock.call_later(self.scenario.publish_s, gateway.worker_changed, registration)

        life.change_role(role, migrate_after_s, tell)

    def _live(self, worker: WorkerId, epoch: int) -> SimulatedWorker:
        life = self.lives[worker] = SimulatedWorker(
            self._totals[worker],
            epoch,
            self.scenario,
            self.clock,
            self._gaps,
            lives=self.lives,
            listeners=self.gateways,
            rng=self._faults_rng,
        )
        if worker == next(iter(self._totals)):
            life.core.set_slowdown(self.scenario.slow_worker, now=self.clock.now)
        return life

    def _plan_kills(self) -> None:
        faults = self.scenario.faults
        for kill in faults.kills:
            self.clock.call_at(kill.at_s, self._kill, kill)
        if faults.kill_every_s is not None:
            self.clock.call_at(faults.kill_every_s, self._kill_again, faults.kill_every_s)

    def _kill_again(self, every_s: float) -> None:
        self._kill(Kill(self.clock.now))
        self.clock.call_later(every_s, self._kill_again, every_s)

    def _kill(self, kill: Kill) -> None:
        living = [life for life in self.lives.values() if life.is_alive and kill.worker in {None, life.id}]
        if not living:
            return
        life = living[0] if len(living) == 1 else self._faults_rng.choice(living)
        life.kill()
        dead_s, clock = self.scenario.dead_s, self.clock
        for gateway in self.gateways:
            clock.call_later(dead_s, gateway.worker_lost, life, f"it said nothing for {dead_s:g} s")
        clock.call_later(self.scenario.faults.restart_s, self._restart, life)

    def _restart(self, before: SimulatedWorker) -> None:
        life = self._live(before.id, before.epoch + 1)
        life.publisher.start(life.core, self.clock.now)
        for gateway in self.gateways:
            self.clock.call_later(self.scenario.publish_s, gateway.worker_up, life)

    # --- sessions ------------------------------------------------------------------------------------------------

    def _plan_sessions(self) -> float:
        """Let them start when they should. Returns the instant of the last start that is known."""
        sessions, num_clients = self._workload.sessions, self._workload.num_clients
        if num_clients is None:
            for number, session in enumerate(sessions):
                self.clock.call_at(session.start_s, self._send, self._gateway(number), session, 0)
            return max((session.start_s for session in sessions), default=0.0)
        for _ in range(min(num_clients, len(sessions))):
            self.clock.call_at(0.0, self._start_next)
        return 0.0

    def _start_next(self) -> None:
        """A client of a closed loop is free."""
        number, sessions = self._num_started, self._workload.sessions
        if number < len(sessions):
            self._num_started += 1
            self._send(self._gateway(number), sessions[number], 0)

    def _gateway(self, number: int) -> SimulatedGateway:
        """Sessions take turns."""
        return self.gateways[number % len(self.gateways)]

    def _send(self, gateway: SimulatedGateway, session: Session, number: int) -> None:
        turn = session.turns[number]
        record = Record(self.clock.now, turn.prompt_tokens, turn.completion_tokens, tenant=session.tenant)
        request = gateway_request(
            RequestId(f"r{len(self._records)}"),
            turn,
            block_size=self.scenario.facts.block_size,
            now=self.clock.now,
            tenant=session.tenant,
        )
        self._records.append(record)

        def ended() -> None:
            self._num_ended += 1
            self._on_progress(self._num_ended, self._workload.num_requests)
            num_left = len(session.turns) - number - 1
            if num_left and record.ending is Ending.FINISHED:
                self.clock.call_later(session.turns[number + 1].think_s, self._send, gateway, session, number + 1)
                return
            self._num_ended += num_left  # nobody asks on without an answer
            if self._workload.num_clients is not None:
                self.clock.call_soon(self._start_next)

        SimulatedDriver(gateway, request, turn, record, ended).start()
