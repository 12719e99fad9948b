"""Which workers hold which blocks: one map from block name to a bit mask of workers.

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

Forgetting a worker is one step: its bit is retired and the map is swept in slices, a few thousand names with each
later change; a bit is used again only after a whole sweep. The map holds live names and those not yet swept.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from operator import xor

import numpy as np

from planes.blocks import Hashes, digest, unpack
from planes.messages import AllCleared, BlocksRemoved, BlocksStored, KvEvents, LoadReport, Snapshot, WorkerId

_MAX_KEPT = 512  # publications kept for a snapshot that is under way
_SWEEP_NAMES = 2048  # names looked at per change while a sweep is on
_MAX_RETIRED = 64  # retired bits, above which a sweep runs to its end at once: masks stay short
_MAX_INTERNED = 1 << 16
_MATCH_NAMES = 256  # names looked up at a time


@dataclass(slots=True)
class _Copy:
    """What we know of one worker's blocks. `limit`: most blocks it can hold."""

    worker: WorkerId
    epoch: int
    limit: int
    bit: int
    seq: int = 0
    num_held: int = 0
    digest: int = 0
    is_exact: bool = True
    reported_seq: int = 0
    kept: deque[KvEvents] = field(default_factory=lambda: deque(maxlen=_MAX_KEPT))


class BlockIndex:
    """Blocks of all workers. `version` grows with every change that a match could see."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._interned: dict[int, int] = {}
        self._copies: dict[WorkerId, _Copy] = {}
        self._owners: list[WorkerId | None] = []
        self._free: list[int] = []
        self._live = 0
        self._retired = 0
        self._sweeping = 0
        self._to_sweep: list[int] = []
        self._workers_of_mask: dict[int, tuple[WorkerId, ...]] = {}
        self.version = 0

    def __len__(self) -> int:
        """Names in the map, those that still wait for the sweep included."""
        return len(self._masks)

    @property
    def is_sweeping(self) -> bool:
        """Whether names of forgotten workers are left in the map."""
        return bool(self._retired)

    @property
    def num_bits(self) -> int:
        """Bits that masks can have: live workers, retired and free ones."""
        return len(self._owners)

    # --- workers -------------------------------------------------------------------------------------------------

    def add(self, worker: WorkerId, epoch: int, limit: int) -> None:
        """Begin an empty copy; an epoch starts with no blocks. The same epoch again changes nothing but `limit`."""
        copy = self._copies.get(worker)
        if copy is not None and copy.epoch == epoch:
            copy.limit = limit
            return
        if copy is not None:
            self._retire(copy.bit)
        self._copies[worker] = _Copy(worker, epoch, limit, self._claim(worker))

    def drop(self, worker: WorkerId) -> None:
        """Forget the worker's blocks. Unknown workers are ignored."""
        copy = self._copies.pop(worker, None)
        if copy is not None:
            self._retire(copy.bit)

    def distrust(self, worker: WorkerId) -> None:
        """Ask for a snapshot: publications may have been missed."""
        copy = self._copies.get(worker)
        if copy is not None:
            copy.is_exact = False

    def num_held(self, worker: WorkerId) -> int:
        copy = self._copies.get(worker)
        return copy.num_held if copy is not None else 0

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
        self.sweep()

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
        self.sweep()

    def check(self, report: LoadReport) -> None:
        """Compare a load report's sequence, digest and count with our copy."""
        copy = self._copies.get(report.worker)
        if copy is None or report.epoch < copy.epoch:
            return
        if report.epoch > copy.epoch:
            copy = self._restart(copy, report.epoch)
        if report.seq == copy.seq:
            if (report.digest, report.num_held) != (copy.digest, copy.num_held):
                copy.is_exact = False
        elif report.seq > copy.seq and (copy.seq == 0 or copy.seq < copy.reported_seq):
            # Never heard of it, or still behind what the report before this one told: not late but lost.
            copy.is_exact = False
        copy.reported_seq = max(copy.reported_seq, report.seq)
        self.sweep()

    def _apply_to(self, copy: _Copy, batch: KvEvents) -> None:
        copy.seq = batch.seq
        for event in batch.events:
            match event:
                case BlocksStored():
                    self._store(copy, unpack(event.hashes))
                case BlocksRemoved():
                    self._remove(copy, unpack(event.hashes))
                case AllCleared():
                    self._forget_blocks(copy)

    def _restart(self, copy: _Copy, epoch: int) -> _Copy:
        self._retire(copy.bit)
        fresh = _Copy(copy.worker, epoch, copy.limit, self._claim(copy.worker))
        self._copies[copy.worker] = fresh
        return fresh

    # --- the map -------------------------------------------------------------------------------------------------

    def _store(self, copy: _Copy, names: Hashes) -> None:
        if copy.num_held + len(names) > 2 * copy.limit + 4096:  # removals were lost, or it counts wrongly
            copy.is_exact = False
            return
        self.version += 1
        keys = names.tolist()
        if self._masks.keys().isdisjoint(keys):  # most news is new to everybody
            known: list[int | None] = []
            distinct: set[int | None] = {None}
        else:
            known = list(map(self._masks.get, keys))
            distinct = set(known)
        for mask in distinct:
            if mask is not None and mask & copy.bit:
                continue
            fresh = dict.fromkeys(
                keys if len(distinct) == 1 else _having(keys, known, mask), self._intern((mask or 0) | copy.bit)
            )
            self._masks.update(fresh)
            copy.num_held += len(fresh)
            copy.digest ^= digest(names) if len(fresh) == len(keys) else reduce(xor, fresh)

    def _remove(self, copy: _Copy, names: Hashes) -> None:
        self.version += 1
        keys = names.tolist()
        known = list(map(self._masks.get, keys))
        distinct = set(known)
        for mask in distinct:
            if mask is None or not mask & copy.bit:
                continue
            gone = dict.fromkeys(keys if len(distinct) == 1 else _having(keys, known, mask))
            self._replace(gone, mask & ~copy.bit)
            copy.num_held -= len(gone)
            copy.digest ^= digest(names) if len(gone) == len(keys) else reduce(xor, gone)

    def _replace(self, keys: Iterable[int], mask: int) -> None:
        if mask & self._live:
            self._masks.update(dict.fromkeys(keys, self._intern(mask)))
        else:
            deque(map(self._masks.pop, keys), maxlen=0)

    def _intern(self, mask: int) -> int:
        """Equal masks are one object: less memory, and runs of them compare by identity."""
        if len(self._interned) >= _MAX_INTERNED:
            self._interned.clear()
        return self._interned.setdefault(mask, mask)

    def _forget_blocks(self, copy: _Copy) -> None:
        if copy.num_held:
            self._retire(copy.bit)
            copy.bit = self._claim(copy.worker)
            copy.num_held, copy.digest = 0, 0

    # --- bits ----------------------------------------------------------------------------------------------------

    def _claim(self, worker: WorkerId) -> int:
        if not self._free:
            self._free.append(len(self._owners))
            self._owners.append(None)
        slot = self._free.pop()
        self._owners[slot] = worker
        self._live |= 1 << slot
        self._workers_of_mask.clear()
        return 1 << slot

    def _retire(self, bit: int) -> None:
        self.version += 1
        self._live &= ~bit
        self._retired |= bit
        self._owners[bit.bit_length() - 1] = None
        self._workers_of_mask.clear()
        if self._retired.bit_count() > _MAX_RETIRED:
            while self._retired:
                self.sweep()

    def sweep(self, limit: int = _SWEEP_NAMES) -> None:
        """Go on cleaning retired bits out of the map, at most `limit` names now."""
        if not self._sweeping:
            if not self._retired:
                return
            self._sweeping, self._to_sweep = self._retired, list(self._masks)
        keys, self._to_sweep[-limit:] = self._to_sweep[-limit:], []
        known = list(map(self._masks.get, keys))
        for mask in set(known):
            if mask is not None and mask & self._sweeping:
                self._replace(_having(keys, known, mask), mask & ~self._sweeping)
        if not self._to_sweep:
            self._free += [slot for slot in range(len(self._owners)) if self._sweeping >> slot & 1]
            self._retired &= ~self._sweeping
            self._sweeping = 0

    # --- questions -----------------------------------------------------------------------------------------------

    def match(self, names: Hashes) -> dict[WorkerId, int]:
        """How many leading blocks of a prompt each worker holds, without a hole; workers with none are left out."""
        found: dict[WorkerId, int] = {}
        alive, depth = self._live, 0
        for start in range(0, len(names), _MATCH_NAMES):
            known = list(map(self._masks.get, names[start : start + _MATCH_NAMES].tolist()))
            if known.count(known[0]) == len(known) and (known[0] or 0) & alive == alive:
                depth += len(known)  # one run, which nobody drops out of: several times as fast
                continue
            for mask, run in groupby(known):
                still = alive & (mask or 0)
                if still != alive:
                    if depth:
                        found.update(dict.fromkeys(self._workers(alive & ~still), depth))
                    if not still:
                        return found
                    alive = still
                depth += len(list(run))
        if depth:
            found.update(dict.fromkeys(self._workers(alive), depth))
        return found

    def _workers(self, mask: int) -> tuple[WorkerId, ...]:
        workers = self._workers_of_mask.get(mask)
        if workers is None:
            if len(self._workers_of_mask) >= _MAX_INTERNED:
                self._workers_of_mask.clear()
            workers = tuple(owner for slot, owner in enumerate(self._owners) if mask >> slot & 1 and owner is not None)
            self._workers_of_mask[mask] = workers
        return workers

    def held(self, worker: WorkerId) -> Hashes:
        """Every block of one worker, in no order; walks the whole map (tests and diagnosis)."""
        copy = self._copies.get(worker)
        bit = copy.bit if copy is not None else 0
        return np.array([name for name, mask in self._masks.items() if mask & bit], dtype=np.uint64)


def _having(keys: list[int], known: list[int | None], mask: int | None) -> list[int]:
    return [key for key, found in zip(keys, known, strict=True) if found == mask]
