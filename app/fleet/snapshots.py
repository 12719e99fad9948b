"""Repairs what the router knows of workers' blocks: asks those for a snapshot whose publications it has missed."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from planes.wire.errors import HeadraceError
from planes.wire.messages import Snapshot, WorkerId

_log = structlog.get_logger()

_PAUSE_S = 0.5
"""Between two snapshots of one worker."""
_AT_ONCE = 4


class SnapshotSource(Protocol):
    """What is asked of the event plane."""

    async def request_snapshot(self, worker: WorkerId) -> Snapshot:
        """Raises:  HeadraceError if it cannot be had now."""


class SnapshotRouter(Protocol):
    """What is asked of the router."""

    def workers_to_snapshot(self) -> list[WorkerId]: ...
    def apply_snapshot(self, snapshot: Snapshot) -> None: ...


class Snapshots:
    """A few at a time. Call `check` after everything that may have shown a gap; `run` does the waiting."""

    def __init__(
        self,
        router: SnapshotRouter,
        source: SnapshotSource,
        *,
        is_current: Callable[[WorkerId, int], bool],
        on_applied: Callable[[], None],
    ) -> None:
        """`is_current`: whether a worker is registered with this epoch; what another one says of it is dropped."""
        self._router = router
        self._source = source
        self._is_current = is_current
        self._on_applied = on_applied
        self._stale = asyncio.Event()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._asking: set[WorkerId] = set()

    def check(self) -> None:
        if self._router.workers_to_snapshot():
            self._stale.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._stale.wait()
                self._stale.clear()
                for worker in self._router.workers_to_snapshot():
                    if worker not in self._asking:
                        self._asking.add(worker)
                        tasks.create_task(self._take(worker))

    async def _take(self, worker: WorkerId) -> None:
        try:
            async with self._slots:
                snapshot = await self._source.request_snapshot(worker)
            if self._is_current(worker, snapshot.epoch):
                self._router.apply_snapshot(snapshot)
                self._on_applied()
        except (HeadraceError, ValueError) as exc:
            _log.warning("snapshot.failed", worker=worker, reason=str(exc))
        except Exception:  # noqa: BLE001 - a worker's answer is at fault, and others' blocks are still to be learned
            _log.exception("snapshot.failed", worker=worker)
        # Whatever is still missing is asked for again when the worker's next event or report shows it.
        await asyncio.sleep(_PAUSE_S)
        self._asking.discard(worker)
