"""A simulated gateway: the live one's router and dispatcher, and its streams to workers on virtual time."""

import random
from collections import Counter
from collections.abc import Callable, Iterable

from app.fleet.peers import BATCH_S, BEAT_S, GatewayPeers
from app.serving.binding import Dispatcher
from app.serving.effects import Noted
from app.serving.events import Event, LegFailed, LegOutput
from app.watchers import Watchers
from loadtest.simulator.clock import Clock
from loadtest.simulator.leg import SimulatedLeg
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.worker import SimulatedWorker
from planes.streams.client import WorkerLost, WorkerUnreachable
from planes.wire.messages import GatewayNews, KvEvents, LoadReport, Registration, RequestId, Snapshot, WorkerId
from router.policies import load_policy
from router.router import Router
from router.settings import RouterSettings


def default_router(scenario: Scenario, number: int) -> Router:
    """A gateway's router; its queue has no limit, so that all policies serve the same requests."""
    settings = RouterSettings(
        queue_limit=10**6, history=1, slo_ttft_s=scenario.slo_ttft_s, slo_itl_s=scenario.slo_itl_s, refuse_late=False
    )
    return Router(settings, load_policy(scenario.policy), rng=random.Random(f"{scenario.seed}/{number}"))


class SimulatedConnection:
    """A gateway's stream to one life of a worker: what `planes.streams.client.WorkerConnection` is."""

    def __init__(self, worker: SimulatedWorker, clock: Clock, hop_s: float) -> None:
        self.worker = worker
        self._clock = clock
        self._hop_s = hop_s
        self._legs: dict[SimulatedLeg, None] = {}
        """In order, so that equal seeds give equal results."""

    def start(self, leg: SimulatedLeg) -> None:
        self._legs[leg] = None
        self._clock.call_later(self._hop_s, self.worker.start, leg)

    def cancel(self, leg: SimulatedLeg) -> None:
        """Nothing more is heard of it."""
        if leg in self._legs:
            del self._legs[leg]
            self._clock.call_later(self._hop_s, self.worker.cancel, leg)

    def release(self, name: RequestId) -> None:
        self._clock.call_later(self._hop_s, self.worker.release, name)

    def receive(self, leg: SimulatedLeg, event: Event) -> None:
        if leg in self._legs:
            if not isinstance(event, LegOutput):
                del self._legs[leg]
            leg.receive(event)

    def note(self, leg: SimulatedLeg, tokens: list[int]) -> None:
        if leg in self._legs:
            leg.note(tokens)

    def lose(self, reason: str) -> None:
        """It has ended, and with it every leg."""
        legs, self._legs = self._legs, {}
        for leg in legs:
            leg.receive(LegFailed(leg.id, WorkerLost(self.worker.id, reason)))


class SimulatedGateway:
    """What exchanges share: the way to the router, connections, who waits for workers, counters."""

    def __init__(self, router: Router, scenario: Scenario, clock: Clock, number: int = 0) -> None:
        self.router = router
        self.scenario = scenario
        self.clock = clock
        self.dispatcher = Dispatcher(router, clock=clock.time, timers=clock)
        self.noted: Counter[Noted] = Counter()
        self._connections: dict[WorkerId, SimulatedConnection] = {}
        self._joins: Watchers[WorkerId] = Watchers()
        self._snapshots: set[WorkerId] = set()
        self._peers = GatewayPeers(router, name=f"{number:016x}", wake=self._tell_soon)
        self._others: list[SimulatedGateway] = []
        self._is_telling = False

    # --- other gateways ------------------------------------------------------------------------------------------

    def join(self, gateways: Iterable["SimulatedGateway"]) -> None:
        """There are others: tell them, from now on, and hear them."""
        self._others = [gateway for gateway in gateways if gateway is not self]
        if self._others:
            self._beat()

    def _beat(self) -> None:
        self._peers.beat(now=self.clock.now)
        self.clock.call_later(BEAT_S, self._beat)

    def _tell_soon(self) -> None:
        if not self._is_telling:
            self._is_telling = True
            self.clock.call_later(BATCH_S, self._tell)

    def _tell(self) -> None:
        self._is_telling = False
        for news in self._peers.take(now=self.clock.now):
            for other in self._others:
                self.clock.call_later(self.scenario.publish_s, other.told, news)

    def told(self, news: GatewayNews) -> None:
        if self._peers.hear(news, now=self.clock.now):
            self.dispatcher.changed()

    # --- workers -------------------------------------------------------------------------------------------------

    def connection(self, worker: WorkerId) -> SimulatedConnection:
        """Raises:  WorkerUnreachable."""
        connection = self._connections.get(worker)
        if connection is None:
            raise WorkerUnreachable(worker, "its stream was lost")
        return connection

    def registration(self, worker: WorkerId) -> Registration:
        """Raises:  WorkerUnreachable."""
        return self.connection(worker).worker.registration

    def watch_joins(self, on_joined: Callable[[WorkerId], None]) -> Callable[[], None]:
        """As `app.fleet.connections.WorkerConnections.watch_joins`."""
        return self._joins.watch(on_joined)

    def worker_up(self, worker: SimulatedWorker) -> None:
        """A worker has registered."""
        before = self._connections.get(worker.id)
        if before is not None:
            self.worker_lost(before.worker, "it has started anew")
        self._connections[worker.id] = SimulatedConnection(worker, self.clock, self.scenario.hop_s)
        self.router.worker_up(worker.registration)
        self.dispatcher.changed()
        self._joins.tell(worker.id)

    def worker_changed(self, registration: Registration) -> None:
        """A worker tells of another role."""
        connection = self._connections.get(registration.worker)
        if connection is not None and connection.worker.epoch == registration.epoch:
            self.router.worker_up(registration)
            self.dispatcher.changed()

    def worker_lost(self, worker: SimulatedWorker, reason: str) -> None:
        """A worker was silent for too long, or has been replaced. Nothing happens if that is known already."""
        connection = self._connections.get(worker.id)
        if connection is None or connection.worker is not worker:
            return
        del self._connections[worker.id]
        self._snapshots.discard(worker.id)
        self.router.worker_down(worker.id)
        connection.lose(reason)
        self.dispatcher.changed()

    # --- the event plane -----------------------------------------------------------------------------------------

    def apply_events(self, batch: KvEvents) -> None:
        self.router.apply_events(batch)

    def apply_load(self, report: LoadReport) -> None:
        self.router.apply_load(report, now=self.clock.now)
        for worker in self.router.workers_to_snapshot():
            if worker not in self._snapshots:
                self._snapshots.add(worker)
                self.clock.call_later(self.scenario.publish_s, self._ask, worker)
        self.dispatcher.changed()

    def _ask(self, worker: WorkerId) -> None:
        connection = self._connections.get(worker)
        if connection is not None and connection.worker.is_alive:
            self.clock.call_later(self.scenario.publish_s, self._apply_snapshot, connection.worker.publisher.snapshot())

    def _apply_snapshot(self, snapshot: Snapshot) -> None:
        self._snapshots.discard(snapshot.worker)
        self.router.apply_snapshot(snapshot)
