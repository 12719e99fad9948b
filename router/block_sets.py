"""Which workers hold which blocks, plainly: a set of names for each worker.

The reference that `block_table` must equal, and what serves where that was not compiled: several times slower, and the
time of a match grows with the workers that hold the beginning.
"""

from functools import reduce
from itertools import takewhile
from operator import xor

import numpy as np

from planes.blocks import Hashes
from planes.messages import WorkerId


class BlockSets:
    """Blocks of all workers; a worker that was never heard of holds none."""

    def __init__(self) -> None:
        self._held: dict[WorkerId, set[int]] = {}
        self._digests: dict[WorkerId, int] = {}

    def store(self, worker: WorkerId, names: Hashes) -> None:
        held = self._held.setdefault(worker, set())
        fresh = set(names.tolist()) - held
        held |= fresh
        self._digests[worker] = reduce(xor, fresh, self._digests.get(worker, 0))

    def remove(self, worker: WorkerId, names: Hashes) -> None:
        held = self._held.setdefault(worker, set())
        gone = held.intersection(names.tolist())
        held -= gone
        self._digests[worker] = reduce(xor, gone, self._digests.get(worker, 0))

    def forget(self, worker: WorkerId) -> None:
        self._held.pop(worker, None)
        self._digests.pop(worker, None)

    def totals(self, worker: WorkerId) -> tuple[int, int]:
        """How many blocks a worker holds, and the XOR of their names."""
        return len(self._held.get(worker, ())), self._digests.get(worker, 0)

    def match(self, names: Hashes) -> dict[WorkerId, int]:
        """How many leading names each worker holds, without a hole; workers with none are left out."""
        keys = names.tolist()
        if not keys:
            return {}
        return {
            worker: len(keys) if held.issuperset(keys) else sum(1 for _ in takewhile(held.__contains__, keys))
            for worker, held in self._held.items()
            if keys[0] in held
        }

    def held(self, worker: WorkerId) -> Hashes:
        """Every block of one worker, in no order."""
        return np.array(list(self._held.get(worker, ())), dtype=np.uint64)
