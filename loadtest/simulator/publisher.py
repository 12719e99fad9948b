"""What one life of a simulated worker publishes: `workers/publications.py` on virtual time."""

import math
from collections.abc import Sequence
from typing import Protocol

from loadtest.simulator.clock import Clock
from planes.wire.messages import KvEvent, KvEvents, LoadReport, Snapshot, WorkerId, WorkerState
from workers.publications import BUSY_REPORT_S, IDLE_REPORT_S, Publications
from workers.sim.core import SimCore


class Listener(Protocol):
    """The event plane's other end: a gateway."""

    def apply_events(self, batch: KvEvents) -> None: ...
    def apply_load(self, report: LoadReport) -> None: ...


class SimulatedPublisher:
    """What `workers.kv_events.Publisher` is. publish_s: how long all of it is under way."""

    def __init__(
        self, worker: WorkerId, epoch: int, clock: Clock, publish_s: float, listeners: Sequence[Listener]
    ) -> None:
        self._clock = clock
        self._publish_s = publish_s
        self._listeners = listeners
        self._publications = Publications(worker, epoch, self._publish)
        self._core: SimCore | None = None
        self._next_at = math.inf

    def start(self, core: SimCore, at: float) -> None:
        """Report the load of `core` from this instant on."""
        self._core = core
        self._plan(at)

    def stop(self) -> None:
        """Nothing more is published, but for what is under way."""
        self._core = None

    def kv_changed(self, events: list[KvEvent]) -> None:
        self._publications.kv_changed(events)

    def seal(self) -> None:
        """Publish what has changed."""
        self._publications.seal()

    def snapshot(self) -> Snapshot:
        return self._publications.snapshot()

    def wake(self) -> None:
        """There is something to do: the next report comes at the pace of a busy worker."""
        soon = self._clock.now + BUSY_REPORT_S
        if self._next_at > soon:
            self._plan(soon)

    def _publish(self, batch: KvEvents) -> None:
        for listener in self._listeners:
            self._clock.call_later(self._publish_s, listener.apply_events, batch)

    def _plan(self, instant: float) -> None:
        self._next_at = instant
        self._clock.call_at(instant, self._report, instant)

    def _report(self, planned: float) -> None:
        """Publish a load report and plan the next, unless another was planned since."""
        core = self._core
        if core is None or planned != self._next_at:
            return
        load = core.load(now=self._clock.now)
        report = self._publications.report(load, core.take_samples(), WorkerState.READY)
        for listener in self._listeners:
            self._clock.call_later(self._publish_s, listener.apply_load, report)
        is_busy = load.num_running + load.num_waiting > 0
        self._plan(self._clock.now + (BUSY_REPORT_S if is_busy else IDLE_REPORT_S))
