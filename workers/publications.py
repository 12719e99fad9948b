"""What a worker publishes of itself, clock-free: numbered KV events, load reports, snapshots.

State first, messages second: the cached set and its digest are right whatever happens to a message. Publications carry
(epoch, seq); one that is lost shows as a gap or as a digest that differs, and whoever notices asks for a snapshot.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from itertools import groupby
from operator import xor

import numpy as np

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

BUSY_REPORT_S, IDLE_REPORT_S = 0.1, 1.0
"""Between two load reports."""
DEFAULT_MESSAGE_BYTES = 1024 * 1024
"""NATS takes this much a message unless told otherwise."""
_MAX_PUBLICATION_EVENTS = 1024
_EVENT_BYTES = 32
"""What an event takes beside its hashes."""


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


class Publications:
    """One start of one worker.

    put: takes what is to be published, in order.  message_bytes: how long a message may be now.
    """

    def __init__(
        self,
        worker: WorkerId,
        epoch: int,
        put: Callable[[KvEvents], None],
        *,
        message_bytes: Callable[[], int] = lambda: DEFAULT_MESSAGE_BYTES,
    ) -> None:
        self._worker = worker
        self._epoch = epoch
        self._put = put
        self._message_bytes = message_bytes
        self._cached = CachedBlocks()
        self._seq = 0
        self._pending: list[KvEvent] = []
        self._pending_bytes = 0

    def kv_changed(self, events: list[KvEvent]) -> None:
        """Take what changed; it is published at the next `seal`, or at once where a message is full."""
        full = max(_EVENT_BYTES, self._message_bytes() // 4)  # a part may come on top of as much, and half is spare
        for event in events:
            self._cached.apply(event)
            for part in _parts(event, full):
                self._pending.append(part)
                self._pending_bytes += _EVENT_BYTES + (0 if isinstance(part, AllCleared) else len(part.hashes))
                if self._pending_bytes >= full or len(self._pending) >= _MAX_PUBLICATION_EVENTS:
                    self.seal()

    def seal(self) -> None:
        """Number what is pending, so that `seq` and the cached set belong together."""
        if self._pending:
            self._seq += 1
            pending, self._pending, self._pending_bytes = self._pending, [], 0
            self._put(KvEvents(self._worker, self._epoch, self._seq, list(_merged(pending))))

    def snapshot(self) -> Snapshot:
        self.seal()
        return Snapshot(self._worker, self._epoch, self._seq, self._cached.packed())

    def report(self, load: EngineLoad, steps: list[StepSample], state: WorkerState) -> LoadReport:
        """The next load report. steps: since the last one, newest last."""
        self.seal()
        return LoadReport(
            worker=self._worker,
            epoch=self._epoch,
            state=state,
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


def _merged(events: list[KvEvent]) -> Iterator[KvEvent]:
    """Neighbours of one kind as one event: a step that fills blocks of many requests tells them one by one."""
    for kind, run in groupby(events, type):
        same = list(run)
        if len(same) == 1 or kind is AllCleared:
            yield same[-1]
        else:
            yield kind(b"".join([event.hashes for event in same if not isinstance(event, AllCleared)]))


def _parts(event: KvEvent, num_bytes: int) -> Iterator[KvEvent]:
    """The event in parts of so many bytes; their order does not matter, their hashes are distinct blocks."""
    if isinstance(event, AllCleared) or len(event.hashes) <= num_bytes:
        yield event
        return
    step = num_bytes // 8 * 8  # whole names
    for start in range(0, len(event.hashes), step):
        yield type(event)(event.hashes[start : start + step])
