"""What each worker holds, as this gateway knows it, and when that has to be asked for.

A worker's copy here is *exact* while its publications arrive without a gap and its load reports carry the digest (XOR
of names) and count that we have too. Where either fails the copy needs a snapshot; until it comes, events go on being
applied (a good guess beats none) and are kept too, so that those later than the snapshot can be applied on top of it.

| copy is | publication                     | load report                         | snapshot                    |
|---------|---------------------------------|-------------------------------------|-----------------------------|
| exact   | next seq: apply; old: ignore;   | seq, digest, count agree: stays;    | no newer seq: ignored;      |
|         | gap: apply and keep → inexact   | differ, or a tail is lost → inexact | newer: replaces the copy    |
| inexact | new: apply and keep; old:       | nothing to compare                  | replaces; later kept ones   |
|         | ignore                          |                                     | on top → exact if no hole   |
| any     | newer epoch: forget the worker's blocks first; older epoch: ignore                                     |

The blocks themselves lie in a compiled table (`block_table`), or in plain masks (`block_masks`) where it was not built.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from planes.wire.blocks import Hashes, unpack
from planes.wire.messages import AllCleared, BlocksRemoved, BlocksStored, KvEvents, LoadReport, Snapshot, WorkerId
from router.index.block_masks import BlockMasks
from router.index.block_table import LIBRARY, BlockTable, NotCompiledError, load

_MAX_KEPT = 512  # publications kept for a snapshot that is under way


class Blocks(Protocol):
    """Which workers hold which blocks; a worker that was never heard of holds none."""

    def store(self, worker: WorkerId, names: Hashes) -> None: ...

    def remove(self, worker: WorkerId, names: Hashes) -> None: ...

    def forget(self, worker: WorkerId) -> None: ...

    def totals(self, worker: WorkerId) -> tuple[int, int]:
        """How many blocks a worker holds, and the XOR of their names."""

    def match(self, names: Hashes) -> dict[WorkerId, int]:
        """How many leading names each worker holds, without a hole; workers with none are left out."""

    def holds(self, worker: WorkerId, name: int) -> bool:
        """Whether the worker holds a block, whatever lies before it."""

    def held(self, worker: WorkerId) -> Hashes:
        """Every block of one worker, in no order."""


def fastest_blocks(library: str = LIBRARY) -> tuple[Blocks, str]:
    """The compiled table and "", or plain masks and the reason."""
    try:
        return BlockTable(load(library)), ""
    except NotCompiledError as exc:
        return BlockMasks(), str(exc)


@dataclass(slots=True)
class _Copy:
    """What we know of one worker's blocks. `limit`: most blocks it can hold."""

    worker: WorkerId
    epoch: int
    limit: int
    seq: int = 0
    num_cached: int = 0
    digest: int = 0
    is_exact: bool = True
    reported_seq: int = 0
    kept: deque[KvEvents] = field(default_factory=lambda: deque(maxlen=_MAX_KEPT))


class BlockIndex:
    """Blocks of all workers. Without `blocks`: the compiled table, or plain masks and `fallback` says why."""

    def __init__(self, blocks: Blocks | None = None) -> None:
        self._blocks, self.fallback = (blocks, "") if blocks is not None else fastest_blocks()
        self._copies: dict[WorkerId, _Copy] = {}
        self.changes = 0
        """Grows whenever any worker's blocks may have changed."""

    def __len__(self) -> int:
        """Blocks held, summed over the workers."""
        return sum(copy.num_cached for copy in self._copies.values())

    # --- workers -------------------------------------------------------------------------------------------------

    def add(self, worker: WorkerId, epoch: int, limit: int) -> None:
        """Begin an empty copy; an epoch starts with no blocks. The same epoch again changes nothing but `limit`."""
        copy = self._copies.get(worker)
        if copy is not None and copy.epoch == epoch:
            copy.limit = limit
            return
        self.changes += 1
        self._blocks.forget(worker)
        self._copies[worker] = _Copy(worker, epoch, limit)

    def drop(self, worker: WorkerId) -> None:
        """Forget the worker's blocks. Unknown workers are ignored."""
        self.changes += 1
        self._copies.pop(worker, None)
        self._blocks.forget(worker)

    def distrust(self, worker: WorkerId) -> None:
        """Ask for a snapshot: publications may have been missed."""
        copy = self._copies.get(worker)
        if copy is not None:
            copy.is_exact = False

    def num_cached(self, worker: WorkerId) -> int:
        copy = self._copies.get(worker)
        return copy.num_cached if copy is not None else 0

    def is_exact(self, worker: WorkerId) -> bool:
        copy = self._copies.get(worker)
        return copy is not None and copy.is_exact

    def inexact(self) -> list[WorkerId]:
        """Workers whose blocks we do not know for sure."""
        return [copy.worker for copy in self._copies.values() if not copy.is_exact]

    # --- news ----------------------------------------------------------------------------------------------------

    def apply(self, batch: KvEvents) -> None:
        """Take in one publication. Raises:  ValueError if packed hashes have a bad length."""
        copy = self._copies.get(batch.worker)
        if copy is None or batch.epoch < copy.epoch:
            return
        if batch.epoch > copy.epoch:
            copy = self._restart(copy, batch.epoch)
        if batch.seq <= copy.seq:
            return
        if batch.seq != copy.seq + 1:
            copy.is_exact = False
        if not copy.is_exact:
            copy.kept.append(batch)
        self._apply_to(copy, batch)

    def apply_snapshot(self, snapshot: Snapshot) -> None:
        """Replace a copy. Raises:  ValueError if packed hashes have a bad length."""
        copy = self._copies.get(snapshot.worker)
        if copy is None or snapshot.epoch < copy.epoch:
            return
        if snapshot.epoch == copy.epoch and copy.is_exact and snapshot.seq <= copy.seq:
            return
        names = unpack(snapshot.hashes)
        later = [batch for batch in copy.kept if batch.epoch == snapshot.epoch and batch.seq > snapshot.seq]
        known_seq = copy.seq if snapshot.epoch == copy.epoch else 0
        copy = self._restart(copy, snapshot.epoch)
        self._store(copy, names)
        copy.seq = snapshot.seq
        for batch in later:
            copy.is_exact = copy.is_exact and batch.seq == copy.seq + 1
            self._apply_to(copy, batch)
        if copy.seq < known_seq:  # publications between the snapshot and now are not kept: the next one will do
            copy.seq, copy.is_exact = known_seq, False
        if not copy.is_exact:
            copy.kept.extend(later)

    def check(self, report: LoadReport) -> None:
        """Compare a load report's sequence, digest and count with our copy."""
        copy = self._copies.get(report.worker)
        if copy is None or report.epoch < copy.epoch:
            return
        if report.epoch > copy.epoch:
            copy = self._restart(copy, report.epoch)
        if report.seq == copy.seq:
            if (report.digest, report.num_cached) != (copy.digest, copy.num_cached):
                copy.is_exact = False
        elif report.seq > copy.seq and (copy.seq == 0 or copy.seq < copy.reported_seq):
            # Never heard of it, or still behind what the report before this one told: not late but lost.
            copy.is_exact = False
        copy.reported_seq = max(copy.reported_seq, report.seq)

    def _apply_to(self, copy: _Copy, batch: KvEvents) -> None:
        self.changes += 1
        copy.seq = batch.seq
        for event in batch.events:
            match event:
                case BlocksStored():
                    self._store(copy, unpack(event.hashes))
                case BlocksRemoved():
                    self._remove(copy, unpack(event.hashes))
                case AllCleared():
                    self._blocks.forget(copy.worker)
                    copy.num_cached, copy.digest = 0, 0

    def _restart(self, copy: _Copy, epoch: int) -> _Copy:
        self.changes += 1
        self._blocks.forget(copy.worker)
        fresh = self._copies[copy.worker] = _Copy(copy.worker, epoch, copy.limit)
        return fresh

    def _store(self, copy: _Copy, names: Hashes) -> None:
        if copy.num_cached + len(names) > 2 * copy.limit + 4096:  # removals were lost, or it counts wrongly
            copy.is_exact = False
            return
        try:
            self._blocks.store(copy.worker, names)
        finally:  # out of memory, part of them are in
            copy.num_cached, copy.digest = self._blocks.totals(copy.worker)

    def _remove(self, copy: _Copy, names: Hashes) -> None:
        try:
            self._blocks.remove(copy.worker, names)
        finally:
            copy.num_cached, copy.digest = self._blocks.totals(copy.worker)

    # --- questions -----------------------------------------------------------------------------------------------

    def match(self, names: Hashes) -> dict[WorkerId, int]:
        """How many leading blocks of a prompt each worker holds, without a hole; workers with none are left out."""
        return self._blocks.match(names)

    def holds(self, worker: WorkerId, name: int) -> bool:
        """Whether the worker holds a block, whatever lies before it."""
        return self._blocks.holds(worker, name)

    def held(self, worker: WorkerId) -> Hashes:
        """Every block of one worker, in no order; may walk the whole index (tests and diagnosis)."""
        return self._blocks.held(worker)
