"""Which workers hold which blocks, plainly: a dictionary from names to bit masks of workers.

The reference that `block_table` must equal, and what serves where that was not compiled: several times slower, and
forgetting a worker walks over all names.
"""

from functools import reduce
from itertools import chain
from operator import xor

import numpy as np

from planes.wire.blocks import Hashes
from planes.wire.messages import WorkerId


class BlockMasks:
    """Blocks of all workers; a worker that was never heard of holds none."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._bits: dict[WorkerId, int] = {}
        self._owners: dict[int, WorkerId] = {}
        self._totals: dict[WorkerId, tuple[int, int]] = {}

    def store(self, worker: WorkerId, names: Hashes) -> None:
        bit, masks, fresh = self._bit(worker), self._masks, []
        last, stored = -1, 0
        for name in names.tolist():
            mask = masks.get(name, 0)
            if not mask & bit:
                if mask != last:
                    last, stored = mask, mask | bit  # one object for all that follow it: less memory
                masks[name] = stored
                fresh.append(name)
        held, digest = self.totals(worker)
        self._totals[worker] = (held + len(fresh), reduce(xor, fresh, digest))

    def remove(self, worker: WorkerId, names: Hashes) -> None:
        bit, masks, gone = self._bits.get(worker, 0), self._masks, []
        last, left = -1, 0
        for name in names.tolist():
            mask = masks.get(name, 0)
            if mask & bit:
                if mask != last:
                    last, left = mask, mask & ~bit
                if left:
                    masks[name] = left
                else:
                    del masks[name]
                gone.append(name)
        held, digest = self.totals(worker)
        self._totals[worker] = (held - len(gone), reduce(xor, gone, digest))

    def forget(self, worker: WorkerId) -> None:
        self.remove(worker, self.held(worker))
        del self._totals[worker]
        self._owners.pop(self._bits.pop(worker, 0), None)

    def totals(self, worker: WorkerId) -> tuple[int, int]:
        """How many blocks a worker holds, and the XOR of their names."""
        return self._totals.get(worker, (0, 0))

    def match(self, names: Hashes) -> dict[WorkerId, int]:
        """How many leading names each worker holds, without a hole; workers with none are left out."""
        found: dict[WorkerId, int] = {}
        alive = -1
        for depth, mask in enumerate(chain(map(self._masks.get, names.tolist()), (0,))):
            still = alive & (mask or 0)
            if still != alive:
                if depth:
                    found.update(dict.fromkeys(self._workers(alive & ~still), depth))
                if not still:
                    break
                alive = still
        return found

    def holds(self, worker: WorkerId, name: int) -> bool:
        """Whether the worker holds a block, whatever lies before it."""
        return bool(self._masks.get(name, 0) & self._bits.get(worker, 0))

    def held(self, worker: WorkerId) -> Hashes:
        """Every block of one worker, in no order; walks over all names."""
        bit = self._bits.get(worker, 0)
        return np.array([name for name, mask in self._masks.items() if mask & bit] if bit else [], dtype=np.uint64)

    def _bit(self, worker: WorkerId) -> int:
        """The worker's; the lowest unused one for a new worker."""
        bit = self._bits.get(worker)
        if bit is None:
            bit = 1
            while bit in self._owners:
                bit <<= 1
            self._bits[worker], self._owners[bit] = bit, worker
        return bit

    def _workers(self, mask: int) -> list[WorkerId]:
        workers = []
        while mask:
            workers.append(self._owners[mask & -mask])
            mask &= mask - 1
        return workers
