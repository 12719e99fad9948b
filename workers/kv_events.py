"""How a worker tells the event plane what it holds and how busy it is: `publications.py` on the event loop."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Protocol

from planes.events import Connects
from planes.wire.messages import KvEvent, KvEvents, LoadReport, Snapshot, StepSample, WorkerId, WorkerState
from workers.engine.base import EngineLoad
from workers.publications import BUSY_REPORT_S, IDLE_REPORT_S, Publications

_GATHER_S = 0.005
"""Between two publications: steps may be as short, and every message wakes NATS and all gateways."""
_MAX_STEPS = 256
_MAX_UNSENT = 64
"""Publications; the oldest is dropped for the 65th, and the gap shows."""


class Events(Connects, Protocol):
    """What is needed of `planes.events.EventPlane`."""

    @property
    def max_message_bytes(self) -> int: ...
    async def publish_kv(self, events: KvEvents) -> None: ...
    async def publish_load(self, report: LoadReport) -> None: ...
    async def serve_snapshots(self, worker: WorkerId, take: Callable[[], Snapshot]) -> None: ...


class Publisher:
    """The engine's observer. Everything is called on the event loop; `run` sends."""

    def __init__(
        self,
        worker: WorkerId,
        epoch: int,
        events: Events,
        *,
        load: Callable[[], EngineLoad],
        on_death: Callable[[str], None],
    ) -> None:
        """Args:  load: the engine's.  on_death: told once why the engine is gone."""
        self._worker = worker
        self._events = events
        self._load = load
        self._on_death = on_death
        self._state = WorkerState.READY
        self._publications = Publications(
            worker, epoch, self._put, message_bytes=lambda: self._events.max_message_bytes
        )
        self._steps: deque[StepSample] = deque(maxlen=_MAX_STEPS)
        self._unsent: deque[KvEvents | LoadReport] = deque(maxlen=_MAX_UNSENT)
        self._has_unsent = asyncio.Event()
        self._activity = asyncio.Event()
        """Set when a report should not wait for its turn in idleness."""

    async def run(self) -> None:
        """Publish until cancelled: KV events within milliseconds, load reports at their pace, snapshots when asked."""
        connected = asyncio.Event()
        self._events.on_connect(connected.set)
        self._events.on_connect(self._activity.set)
        await self._events.serve_snapshots(self._worker, self.snapshot)
        await connected.wait()  # nobody could hear us before
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send())
            group.create_task(self._report())

    def drain(self) -> None:
        """Say so in the load reports, from now on."""
        self._state = WorkerState.DRAINING
        self._activity.set()

    # --- what the engine tells -------------------------------------------------------------------------------------

    def kv_changed(self, events: list[KvEvent]) -> None:
        self._publications.kv_changed(events)
        self._has_unsent.set()

    def stepped(self, sample: StepSample) -> None:
        self._steps.append(sample)
        self._activity.set()

    def died(self, reason: str) -> None:
        self._on_death(reason)

    # --- what others hear ------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return self._publications.snapshot()

    def report(self) -> LoadReport:
        """The next load report; takes the step samples along."""
        steps = list(self._steps)
        self._steps.clear()
        return self._publications.report(self._load(), steps, self._state)

    # --- sending ---------------------------------------------------------------------------------------------------

    def _put(self, message: KvEvents | LoadReport) -> None:
        self._unsent.append(message)
        self._has_unsent.set()

    async def _send(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            self._publications.seal()
            while self._unsent:
                message = self._unsent.popleft()
                if isinstance(message, KvEvents):
                    await self._events.publish_kv(message)
                else:
                    await self._events.publish_load(message)
            await asyncio.sleep(_GATHER_S)

    async def _report(self) -> None:
        while True:
            self._activity.clear()
            report = self.report()
            self._put(report)
            await asyncio.sleep(BUSY_REPORT_S)
            if not (report.num_running or report.num_waiting):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_REPORT_S - BUSY_REPORT_S):
                        await self._activity.wait()
