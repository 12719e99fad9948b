"""The workers that this gateway can reach: from their registrations to open streams and what the router knows of them.

    registered ── model card there ── connected ──► up for routing
                                        └─ stream lost ──► down; connect again, with growing pauses
    registration gone, or replaced ──► down for routing; the stream stays until its requests have ended

etcd and NATS may both be away: who is connected stays connected, and the router goes on with what it knew. Nothing that
a worker says ends more than the use of that worker: whatever connecting to it raises is logged and tried again.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Protocol

import msgspec
import structlog

from app.fleet.snapshots import Snapshots, SnapshotSource
from app.fleet.split import split_gauges, splits_of
from app.fleet.status import RegisteredWorker, registered_worker, worker_gauges
from app.metrics import Gauge, Total
from app.prompt.card import CardUnusable
from app.serving.binding import Clock, Dispatcher
from app.watchers import Watchers
from planes.streams.client import WorkerConnection, WorkerUnreachable
from planes.wire.errors import HeadraceError
from planes.wire.floods import is_notable
from planes.wire.messages import KvEvents, LoadReport, Registration, WorkerId, WorkerState
from router.router import Router

_log = structlog.get_logger()

Connect = Callable[[Registration], Awaitable[WorkerConnection]]
"""Opens the stream to a registered worker.  Raises:  WorkerUnreachable."""

_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.1, 5.0
_MOST_UNUSABLE_PAUSE_S = 60.0
"""What is wrong with a model card costs a tokenizer's loading each time, and is mended by another card."""
_STABLE_S = 5.0
"""A stream that held for so long is connected again at once; one that keeps breaking costs ever fewer attempts."""
_RETIRED_CHECK_S = 5.0
"""How often a connection looks whether it is still wanted."""


class WorkerModels(Protocol):
    """What is asked of `app.prompt.catalog.Models`: a worker can be used once its tokenizer is there."""

    def registered(self, registration: Registration) -> None: ...
    def deregistered(self, worker: WorkerId) -> None: ...
    def worker_up(self, worker: WorkerId) -> None:
        """Raises:  HeadraceError if it must not be used beside the others."""

    def worker_down(self, worker: WorkerId) -> None: ...
    async def load(self, registration: Registration) -> None:
        """Returns at once if the tokenizer is there.  Raises:  HeadraceError if it cannot be had now."""


class _Member:
    """One registered start of one worker."""

    def __init__(self, registration: Registration) -> None:
        self.registration = registration
        """`state` is draining as soon as etcd or a load report has said so."""
        self.connection: WorkerConnection | None = None
        self.is_registered = True
        self.is_up = False
        """Whether the router and the models count it in."""
        self.report: LoadReport | None = None
        self.refused_because = ""
        """Why this gateway sends it nothing, though it could be reached."""
        self.task: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        return self.connection is not None and self.registration.state is WorkerState.READY


class WorkerConnections:
    """Registrations and events in, connections out. `run` does the waiting."""

    def __init__(
        self,
        router: Router,
        dispatcher: Dispatcher,
        models: WorkerModels,
        snapshots: SnapshotSource,
        *,
        connect: Connect,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._router = router
        self._dispatcher = dispatcher
        self._models = models
        self._connect = connect
        self._clock = clock
        self._rng = rng
        self._members: dict[WorkerId, _Member] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._snapshots = Snapshots(router, snapshots, is_current=self._is_current, on_applied=dispatcher.changed)
        self._joins: Watchers[WorkerId] = Watchers()
        self.reports: Watchers[LoadReport] = Watchers()
        """Who is told of load reports as they come."""
        self.splits: Mapping[str, str] = {}
        """Where the registered workers disagree on what a model is, in a sentence each."""
        self._bytes_of_closed = [0, 0]
        self._num_refused = 0

    async def run(self) -> None:
        """Connect to workers and repair the index until cancelled; then close every connection."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for member in self._members.values():
                    self._start(member)
                await self._snapshots.run()
        finally:
            self._tasks = None

    # --- the control plane says ----------------------------------------------------------------------------------

    def worker_up(self, registration: Registration) -> None:
        """A worker registered, or changed its registration."""
        member = self._members.get(registration.worker)
        if member is not None and _is_same_start(member.registration, registration):
            self._change(member, registration)
            return
        if member is not None:
            self._retire(member)
        _log.info("worker.registered", worker=registration.worker, role=registration.role, address=registration.address)
        member = self._members[registration.worker] = _Member(registration)
        self._models.registered(registration)
        self._look_for_splits()
        self._start(member)

    def worker_down(self, worker: WorkerId) -> None:
        """A worker's registration is gone. Its streams may end in peace."""
        member = self._members.pop(worker, None)
        if member is not None:
            _log.info("worker.deregistered", worker=worker)
            self._retire(member)
            self._models.deregistered(worker)
            self._look_for_splits()

    # --- the event plane says ------------------------------------------------------------------------------------

    def kv_changed(self, batch: KvEvents) -> None:
        """Publications of workers that are not registered, or not with this epoch, are dropped."""
        if self._is_current(batch.worker, batch.epoch):
            try:
                self._router.apply_events(batch)
            except Exception as exc:  # noqa: BLE001 - the publication is at fault, and there will be others
                self._refused("events.refused", batch.worker, exc)
            self._snapshots.check()

    def load_reported(self, report: LoadReport) -> None:
        """Reports of workers that are not registered, or not with this epoch, are dropped."""
        member = self._members.get(report.worker)
        if member is None or member.registration.epoch != report.epoch:
            return
        member.report = report
        try:
            if report.state is not member.registration.state:
                self._change(member, msgspec.structs.replace(member.registration, state=report.state))
            self._router.apply_load(report, now=self._clock())
            self.reports.tell(report)
        except Exception as exc:  # noqa: BLE001 - as above
            self._refused("report.refused", report.worker, exc)
        self._snapshots.check()
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

    def registrations(self) -> list[Registration]:
        """Of all workers, as they are now."""
        return [member.registration for member in self._members.values()]

    def watch_joins(self, on_joined: Callable[[WorkerId], None]) -> Callable[[], None]:
        """Call `on_joined` with each worker that comes up for routing.  Returns: what ends that."""
        return self._joins.watch(on_joined)

    def is_connected(self, worker: WorkerId) -> bool:
        member = self._members.get(worker)
        return member is not None and member.connection is not None

    def is_pulled(self, model: str) -> bool:
        """Whether some worker takes prefill jobs of this model from the queue."""
        return any(
            member.is_ready and member.registration.is_pulling and member.registration.model == model
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
        return any(member.is_ready and member.registration.takes_answers for member in self._members.values())

    def statuses(self) -> list[RegisteredWorker]:
        return [
            registered_worker(
                member.registration,
                member.report,
                num_streams=None if member.connection is None else member.connection.num_streams,
                refused_because=member.refused_because,
            )
            for _, member in sorted(self._members.items())
        ]

    def gauges(self) -> Iterator[Gauge]:
        """For the metrics."""
        yield from worker_gauges(self.statuses())
        yield from split_gauges(member.registration for member in self._members.values())
        received, sent = self._bytes_of_closed
        for member in self._members.values():
            if member.connection is not None:
                received += member.connection.num_bytes_received
                sent += member.connection.num_bytes_sent
        for direction, count in (("received", received), ("sent", sent)):
            yield Total("stream_bytes", "Bytes on workers' streams.", count, (("direction", direction),))

    # --- one worker's life ---------------------------------------------------------------------------------------

    def _start(self, member: _Member) -> None:
        if self._tasks is not None and member.task is None:
            member.task = self._tasks.create_task(self._keep(member))

    def _change(self, member: _Member, registration: Registration) -> None:
        """A worker says something new of itself. One that drains never comes back, whoever is late to say so."""
        if member.registration.state is WorkerState.DRAINING:
            registration = msgspec.structs.replace(registration, state=WorkerState.DRAINING)
        if registration == member.registration:
            return
        member.registration = registration
        self._models.registered(registration)
        if not member.is_up:
            return
        try:
            self._router.worker_up(registration)
        except Exception:  # noqa: BLE001 - the registration is at fault, and is this worker's alone
            _log.exception("worker.unusable", worker=registration.worker)
            self._down(member)
        self._dispatcher.changed()

    def _retire(self, member: _Member) -> None:
        """Route nothing more there; without a stream there is nothing to wait for either."""
        member.is_registered = False
        self._down(member)
        if member.connection is None:
            if member.task is not None:
                member.task.cancel()
        elif not member.connection.num_streams:
            member.connection.close()

    async def _keep(self, member: _Member) -> None:
        """Whatever goes wrong is this worker's alone: it is logged, and tried again after growing pauses."""
        worker, pause_s = member.registration.worker, _LEAST_PAUSE_S
        while member.is_registered:
            most_s = _MOST_PAUSE_S
            try:
                await self._models.load(member.registration)
                member.refused_because = ""
                connection = await self._connect(member.registration)
                since = self._clock()
                await self._hold(member, connection)
                if self._clock() - since > _STABLE_S:
                    pause_s = _LEAST_PAUSE_S
            except CardUnusable as exc:
                most_s = _MOST_UNUSABLE_PAUSE_S
                member.refused_because = str(exc)
                _log.error("worker.unusable", worker=worker, reason=str(exc), retry_s=round(pause_s, 1))
            except HeadraceError as exc:
                _log.warning("worker.unreachable", worker=worker, reason=str(exc))
            except Exception:  # noqa: BLE001 - as the docstring says
                most_s = _MOST_UNUSABLE_PAUSE_S
                _log.exception("worker.unusable", worker=worker, retry_s=round(pause_s, 1))
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
            pause_s = min(most_s, pause_s * 2)

    async def _hold(self, member: _Member, connection: WorkerConnection) -> None:
        """Let the router use a connection until it ends."""
        worker = member.registration.worker
        member.connection = connection
        try:
            self._up(member)
            _log.info("worker.connected", worker=worker)
            while not connection.closed.done():
                await asyncio.wait([connection.closed], timeout=_RETIRED_CHECK_S)
                if not member.is_registered and not connection.num_streams:
                    connection.close()
            _log.info("worker.disconnected", worker=worker, reason=connection.closed.result())
        finally:
            connection.close()
            member.connection = None
            self._bytes_of_closed[0] += connection.num_bytes_received
            self._bytes_of_closed[1] += connection.num_bytes_sent
            self._down(member)

    def _up(self, member: _Member) -> None:
        """Raises:  whatever says that the worker cannot be used; then it is not."""
        worker = member.registration.worker
        self._models.worker_up(worker)
        try:
            self._router.worker_up(member.registration)
        except Exception:
            self._models.worker_down(worker)
            raise
        member.is_up = True
        self._snapshots.check()
        self._dispatcher.changed()
        self._joins.tell(worker)

    def _down(self, member: _Member) -> None:
        if member.is_up:
            member.is_up = False
            self._models.worker_down(member.registration.worker)
            self._router.worker_down(member.registration.worker)
            self._dispatcher.changed()

    # --- what all workers say together -----------------------------------------------------------------------------

    def _is_current(self, worker: WorkerId, epoch: int) -> bool:
        member = self._members.get(worker)
        return member is not None and member.registration.epoch == epoch

    def _look_for_splits(self) -> None:
        splits = splits_of(member.registration for member in self._members.values())
        for what in splits.keys() - self.splits.keys():
            _log.warning("fleet.split", reason=splits[what])
        for what in self.splits.keys() - splits.keys():
            _log.info("fleet.agrees", what=what)
        self.splits = splits

    def _refused(self, event: str, worker: WorkerId, exc: Exception) -> None:
        self._num_refused += 1
        if is_notable(self._num_refused):
            _log.warning(event, worker=worker, total=self._num_refused, reason=f"{type(exc).__name__}: {exc}")


def _is_same_start(one: Registration, other: Registration) -> bool:
    """Whether nothing has changed but what may: what else a start says of itself stays true as long as it runs."""
    may_change = ("state", "role", "becoming", "is_pinned", "is_pulling", "adapters")
    changes = {name: getattr(other, name) for name in may_change}
    return msgspec.structs.replace(one, **changes) == other
