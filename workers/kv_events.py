"""What a worker tells the event plane: which KV blocks it holds, how busy it is, and its whole set when asked.

State first, messages second: the cached set and its digest are right whatever happens to a message. Publications carry
(epoch, seq); one that is lost shows as a gap or as a digest that differs, and whoever notices asks for a snapshot.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import groupby
from operator import xor
from typing import Protocol

import numpy as np

from planes.events import Connects
from planes.wire.blocks import digest, pack, unpack
from planes.wire.messages import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    KvEvent,
    KvEvents,
    LoadReport,
    Snapshot,
    StepSample,
    WorkerId,
    WorkerState,
)
from workers.engine.base import EngineLoad

_BUSY_S, _IDLE_S = 0.1, 1.0
_GATHER_S = 0.005
"""Between two publications: steps may be as short, and every message wakes NATS and all gateways."""
_MAX_STEPS = 256
_MAX_PUBLICATION_BYTES = 256 * 1024
"""Of hashes; NATS takes 1 MB a message unless told otherwise."""
_MAX_PUBLICATION_EVENTS = 1024
_MAX_UNSENT = 64
"""Publications; the oldest is dropped for the 65th, and the gap shows."""


class Events(Connects, Protocol):
    """What is needed of `planes.events.EventPlane`."""

    async def publish_kv(self, events: KvEvents) -> None: ...
    async def publish_load(self, report: LoadReport) -> None: ...
    async def serve_snapshots(self, worker: WorkerId, take: Callable[[], Snapshot]) -> None: ...


class CachedBlocks:
    """The names of the blocks a worker holds, and the XOR of them all."""

    def __init__(self) -> None:
        self._names: set[int] = set()
        self.digest = 0

    def __len__(self) -> int:
        return len(self._names)

    def apply(self, event: KvEvent) -> None:
        match event:
            case BlocksStored(hashes):
                added = set(unpack(hashes).tolist()) - self._names
                self._names |= added
                self._toggle(added)
            case BlocksRemoved(hashes):
                removed = self._names.intersection(unpack(hashes).tolist())
                self._names -= removed
                self._toggle(removed)
            case AllCleared():
                self._names.clear()
                self.digest = 0

    def packed(self) -> bytes:
        return pack(np.fromiter(self._names, np.uint64, len(self._names)))

    def _toggle(self, names: set[int]) -> None:
        if len(names) < 64:  # numpy's fixed cost is more than this
            self.digest = reduce(xor, names, self.digest)
        else:
            self.digest ^= digest(np.fromiter(names, np.uint64, len(names)))


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
        self._epoch = epoch
        self._events = events
        self._load = load
        self._on_death = on_death
        self._state = WorkerState.READY
        self._cached = CachedBlocks()
        self._seq = 0
        self._pending: list[KvEvent] = []
        self._pending_bytes = 0
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
        for event in events:
            self._cached.apply(event)
            for part in _parts(event):
                self._pending.append(part)
                self._pending_bytes += 0 if isinstance(part, AllCleared) else len(part.hashes)
                if self._pending_bytes >= _MAX_PUBLICATION_BYTES or len(self._pending) >= _MAX_PUBLICATION_EVENTS:
                    self._seal()
        self._has_unsent.set()

    def stepped(self, sample: StepSample) -> None:
        self._steps.append(sample)
        self._activity.set()

    def died(self, reason: str) -> None:
        self._on_death(reason)

    # --- what others hear ------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        self._seal()
        return Snapshot(self._worker, self._epoch, self._seq, self._cached.packed())

    def report(self) -> LoadReport:
        """The next load report; takes the step samples along."""
        self._seal()
        load = self._load()
        steps = list(self._steps)
        self._steps.clear()
        return LoadReport(
            worker=self._worker,
            epoch=self._epoch,
            state=self._state,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            waiting_prefill_tokens=load.waiting_prefill_tokens,
            free_blocks=load.free_blocks,
            kv_tokens=load.kv_tokens,
            seq=self._seq,
            num_cached=len(self._cached),
            digest=self._cached.digest,
            steps=steps,
        )

    # --- sending ---------------------------------------------------------------------------------------------------

    def _seal(self) -> None:
        """Number what is pending, so that `seq` and the cached set belong together."""
        if self._pending:
            self._seq += 1
            self._put(KvEvents(self._worker, self._epoch, self._seq, list(_merged(self._pending))))
            self._pending, self._pending_bytes = [], 0

    def _put(self, message: KvEvents | LoadReport) -> None:
        self._unsent.append(message)
        self._has_unsent.set()

    async def _send(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            self._seal()
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
            await asyncio.sleep(_BUSY_S)
            if not (report.num_running or report.num_waiting):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_IDLE_S - _BUSY_S):
                        await self._activity.wait()


def _merged(events: list[KvEvent]) -> Iterator[KvEvent]:
    """Neighbours of one kind as one event: a step that fills blocks of many requests tells them one by one."""
    for kind, run in groupby(events, type):
        same = list(run)
        if len(same) == 1 or kind is AllCleared:
            yield same[-1]
        else:
            yield kind(b"".join([event.hashes for event in same if not isinstance(event, AllCleared)]))


def _parts(event: KvEvent) -> Iterator[KvEvent]:
    """The event in parts that a message can hold; their order does not matter, their hashes are distinct blocks."""
    if isinstance(event, AllCleared) or len(event.hashes) <= _MAX_PUBLICATION_BYTES:
        yield event
        return
    for start in range(0, len(event.hashes), _MAX_PUBLICATION_BYTES):
        yield type(event)(event.hashes[start : start + _MAX_PUBLICATION_BYTES])
