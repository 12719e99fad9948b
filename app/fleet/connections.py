"""The workers that this gateway can reach: from their registrations to open streams and what the router knows of them.

    registered ── model card there ── connected ──► up for routing
                                        └─ stream lost ──► down; connect again, with growing pauses
    registration gone, or replaced ──► down for routing; the stream stays until its requests have ended

etcd and NATS may both be away: who is connected stays connected, and the router goes on with what it knew.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec
import structlog

from app.metrics import Gauge, Total
from app.serving.binding import Clock, Dispatcher
from planes.streams.client import WorkerConnection, WorkerUnreachable
from planes.wire.errors import HeadraceError
from planes.wire.messages import EngineFacts, KvEvents, LoadReport, Registration, Role, Snapshot, WorkerId, WorkerState
from router.router import Router

_log = structlog.get_logger()

Connect = Callable[[Registration], Awaitable[WorkerConnection]]
"""Opens the stream to a registered worker.  Raises:  WorkerUnreachable."""

_SNAPSHOT_PAUSE_S = 0.5
"""Between two snapshots of one worker."""
_SNAPSHOTS_AT_ONCE = 4
_RETIRED_CHECK_S = 5.0
"""How often a connection looks whether it is still wanted."""


class SnapshotSource(Protocol):
    """What the fleet asks of the event plane."""

    async def request_snapshot(self, worker: WorkerId) -> Snapshot:
        """Raises:  HeadraceError if it cannot be had now."""


class ModelLoader(Protocol):
    """What must be there before a worker can be used: its model's tokenizer."""

    async def load(self, registration: Registration) -> None:
        """Returns at once if it is there.  Raises:  HeadraceError if it cannot be had now."""


class _Member:
    """One registered start of one worker."""

    def __init__(self, registration: Registration) -> None:
        self.registration = registration
        self.connection: WorkerConnection | None = None
        self.is_registered = True
        self.report: LoadReport | None = None
        self.task: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, as `GET /v1/fleet` shows it."""

    worker: str
    role: Role
    model: str
    engine: str
    address: str
    epoch: int
    state: WorkerState
    is_connected: bool
    num_streams: int
    """Requests of this gateway on the worker."""
    facts: EngineFacts
    load: LoadReport | None
    """The last report, without its steps."""


class Fleet:
    """Registrations and events in, connections out. `run` does the waiting."""

    def __init__(
        self,
        router: Router,
        dispatcher: Dispatcher,
        models: ModelLoader,
        snapshots: SnapshotSource,
        *,
        connect: Connect,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._router = router
        self._dispatcher = dispatcher
        self._models = models
        self._snapshots = snapshots
        self._connect = connect
        self._clock = clock
        self._rng = rng
        self._members: dict[WorkerId, _Member] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._stale = asyncio.Event()
        self._join_watchers: dict[object, Callable[[WorkerId], None]] = {}
        self._num_snapshots = asyncio.Semaphore(_SNAPSHOTS_AT_ONCE)
        self._snapshotting: set[WorkerId] = set()
        self._bytes_of_closed = [0, 0]

    async def run(self) -> None:
        """Connect to workers and repair the index until cancelled; then close every connection."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for member in self._members.values():
                    self._start(member)
                while True:
                    await self._stale.wait()
                    self._stale.clear()
                    for worker in self._router.workers_to_snapshot():
                        if worker not in self._snapshotting:
                            self._snapshotting.add(worker)
                            tasks.create_task(self._take_snapshot(worker))
        finally:
            self._tasks = None

    # --- the control plane says ----------------------------------------------------------------------------------

    def worker_up(self, registration: Registration) -> None:
        """A worker registered, or changed its registration."""
        member = self._members.get(registration.worker)
        if member is not None and _is_same_start(member.registration, registration):
            member.registration = registration
            if member.connection is not None:
                self._router.worker_up(registration, now=self._clock())
                self._dispatcher.changed()
            return
        if member is not None:
            self._retire(member)
        _log.info("worker.registered", worker=registration.worker, role=registration.role, address=registration.address)
        member = self._members[registration.worker] = _Member(registration)
        self._start(member)

    def worker_down(self, worker: WorkerId) -> None:
        """A worker's registration is gone. Its streams may end in peace."""
        member = self._members.pop(worker, None)
        if member is not None:
            _log.info("worker.deregistered", worker=worker)
            self._retire(member)

    # --- the event plane says ------------------------------------------------------------------------------------

    def kv_changed(self, batch: KvEvents) -> None:
        try:
            self._router.apply_events(batch, now=self._clock())
        except ValueError as exc:
            _log.warning("events.malformed", worker=batch.worker, reason=str(exc))
        self._check_index()

    def load_reported(self, report: LoadReport) -> None:
        member = self._members.get(report.worker)
        if member is not None and member.registration.epoch == report.epoch:
            member.report = report
        self._router.apply_load(report, now=self._clock())
        self._check_index()
        self._dispatcher.changed()

    # --- lookups -------------------------------------------------------------------------------------------------

    def connection(self, worker: WorkerId) -> WorkerConnection:
        """Raises:  WorkerUnreachable."""
        member = self._members.get(worker)
        if member is None:
            raise WorkerUnreachable(worker, "it is not registered any more")
        if member.connection is None:
            raise WorkerUnreachable(worker, "its stream was lost")
        return member.connection

    def registration(self, worker: WorkerId) -> Registration:
        """Raises:  WorkerUnreachable."""
        member = self._members.get(worker)
        if member is None:
            raise WorkerUnreachable(worker, "it is not registered any more")
        return member.registration

    def watch_joins(self, on_joined: Callable[[WorkerId], None]) -> Callable[[], None]:
        """Call `on_joined` with each worker that comes up for routing.  Returns: what ends that."""
        key = object()
        self._join_watchers[key] = on_joined

        def unwatch() -> None:
            del self._join_watchers[key]

        return unwatch

    def is_connected(self, worker: WorkerId) -> bool:
        member = self._members.get(worker)
        return member is not None and member.connection is not None

    def is_pulled(self, model: str) -> bool:
        """Whether some worker takes prefill jobs of this model from the queue."""
        return any(
            member.registration.is_pulling
            and member.registration.model == model
            and member.registration.state is WorkerState.READY
            and member.connection is not None
            for member in self._members.values()
        )

    def models(self) -> dict[str, int]:
        """Names of the models that registered workers serve, and since when, in seconds since 1970."""
        since: dict[str, int] = {}
        for member in self._members.values():
            started = member.registration.epoch // 10**9
            since[member.registration.model] = min(started, since.get(member.registration.model, started))
        return dict(sorted(since.items()))

    @property
    def num_connected(self) -> int:
        return sum(member.connection is not None for member in self._members.values())

    @property
    def is_serving(self) -> bool:
        """Whether some worker could decode a request now."""
        return any(
            member.connection is not None
            and member.registration.role.can_decode
            and member.registration.state is WorkerState.READY
            for member in self._members.values()
        )

    def statuses(self) -> list[WorkerStatus]:
        return [_status(member) for _, member in sorted(self._members.items())]

    def gauges(self) -> Iterator[Gauge]:
        """For the metrics."""
        counts: dict[tuple[str, str], int] = {}
        received, sent = self._bytes_of_closed
        for member in self._members.values():
            key = (member.registration.role.value, "up" if member.connection is not None else "down")
            counts[key] = counts.get(key, 0) + 1
            if member.connection is not None:
                received += member.connection.num_bytes_received
                sent += member.connection.num_bytes_sent
        for (role, state), count in counts.items():
            yield Gauge("workers", "Registered workers, by stream.", count, (("role", role), ("stream", state)))
        for direction, count in (("received", received), ("sent", sent)):
            yield Total("stream_bytes", "Bytes on workers' streams.", count, (("direction", direction),))
        for worker, member in self._members.items():
            if member.report is not None:
                yield Gauge("worker_blocks", "Blocks held.", member.report.num_cached, (("worker", worker),))
                yield Gauge("worker_running", "Running requests.", member.report.num_running, (("worker", worker),))
                yield Gauge("worker_waiting", "Waiting requests.", member.report.num_waiting, (("worker", worker),))

    # --- one worker's life ---------------------------------------------------------------------------------------

    def _start(self, member: _Member) -> None:
        if self._tasks is not None and member.task is None:
            member.task = self._tasks.create_task(self._keep(member))

    def _retire(self, member: _Member) -> None:
        """Route nothing more there; without a stream there is nothing to wait for either."""
        member.is_registered = False
        if member.connection is not None:
            self._router.worker_down(member.registration.worker, now=self._clock())
            self._dispatcher.changed()
            if not member.connection.num_streams:
                member.connection.close()
        elif member.task is not None:
            member.task.cancel()

    async def _keep(self, member: _Member) -> None:
        pause_s = 0.1
        while member.is_registered:
            try:
                await self._models.load(member.registration)
                connection = await self._connect(member.registration)
            except HeadraceError as exc:
                _log.warning("worker.unreachable", worker=member.registration.worker, reason=str(exc))
                await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
                pause_s = min(5.0, pause_s * 2)
                continue
            pause_s = 0.1
            await self._hold(member, connection)

    async def _hold(self, member: _Member, connection: WorkerConnection) -> None:
        """Let the router use a connection until it ends."""
        worker = member.registration.worker
        member.connection = connection
        _log.info("worker.connected", worker=worker)
        self._router.worker_up(member.registration, now=self._clock())
        self._check_index()
        self._dispatcher.changed()
        for on_joined in list(self._join_watchers.values()):
            on_joined(worker)
        try:
            while not connection.closed.done():
                await asyncio.wait([connection.closed], timeout=_RETIRED_CHECK_S)
                if not member.is_registered and not connection.num_streams:
                    connection.close()
        finally:
            connection.close()
            member.connection = None
            self._bytes_of_closed[0] += connection.num_bytes_received
            self._bytes_of_closed[1] += connection.num_bytes_sent
        _log.info("worker.disconnected", worker=worker, reason=connection.closed.result())
        if member.is_registered:
            self._router.worker_down(worker, now=self._clock())
            self._dispatcher.changed()

    # --- the index -----------------------------------------------------------------------------------------------

    def _check_index(self) -> None:
        if self._router.workers_to_snapshot():
            self._stale.set()

    async def _take_snapshot(self, worker: WorkerId) -> None:
        try:
            async with self._num_snapshots:
                snapshot = await self._snapshots.request_snapshot(worker)
            self._router.apply_snapshot(snapshot, now=self._clock())
            self._dispatcher.changed()
        except (HeadraceError, ValueError) as exc:
            _log.warning("snapshot.failed", worker=worker, reason=str(exc))
        finally:
            # Whatever is still missing is asked for again when the worker's next event or report shows it.
            await asyncio.sleep(_SNAPSHOT_PAUSE_S)
            self._snapshotting.discard(worker)


def _is_same_start(one: Registration, other: Registration) -> bool:
    return (one.epoch, one.address) == (other.epoch, other.address)


def _status(member: _Member) -> WorkerStatus:
    registration, report, connection = member.registration, member.report, member.connection
    return WorkerStatus(
        worker=registration.worker,
        role=registration.role,
        model=registration.model,
        engine=registration.engine,
        address=registration.address,
        epoch=registration.epoch,
        state=registration.state if report is None else report.state,
        is_connected=connection is not None,
        num_streams=0 if connection is None else connection.num_streams,
        facts=registration.facts,
        load=None if report is None else msgspec.structs.replace(report, steps=[]),
    )
