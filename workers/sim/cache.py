"""The simulated engine's paged KV cache: a pool of blocks, reference counts, prefix caching, LRU eviction.

A block is in one of four conditions:

| condition          | referenced | named | where                  | leaves it by                             |
|--------------------|------------|-------|------------------------|------------------------------------------|
| free               | no         | no    | `_free`                | `acquire`, `take`                        |
| in work            | yes        | no    | with its sequences     | `store` (in use), `release` (free)       |
| in use             | yes        | yes   | `_by_name`             | `release` of the last reference (idle)   |
| idle (cached)      | no         | yes   | `_by_name` and `_idle` | `acquire` (in use), eviction (in work)   |

`_idle` is ordered, next to be evicted first. `release` appends a sequence's blocks tail first, as vLLM's free queue
does, so a prefix outlives what hangs on it. Free blocks are used up before anything is evicted.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from planes.wire.blocks import Hashes
from planes.wire.messages import BlocksRemoved, BlocksStored, KvEvent


class SimCache:
    """`num_blocks` blocks, known by their index from 0. A call costs in proportion to the blocks it names."""

    def __init__(self, num_blocks: int, *, on_events: Callable[[list[KvEvent]], None]) -> None:
        self.num_blocks = num_blocks
        self.version = 0
        """Changes whenever a request that did not fit might fit now."""
        self._on_events = on_events
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_name: dict[int, int] = {}
        self._names: list[int | None] = [None] * num_blocks
        self._references = [0] * num_blocks
        self._stored: list[int] = []
        self._removed: list[int] = []

    @property
    def free_blocks(self) -> int:
        """Blocks that `take` could hand out: free and idle ones."""
        return len(self._free) + len(self._idle)

    def match(self, names: Sequence[int], limit: int) -> int:
        """How many of the first `limit` names are cached without a gap, from the first on."""
        by_name = self._by_name
        count = 0
        for name in names:
            if count == limit or name not in by_name:
                break
            count += 1
        return count

    def acquire(self, names: Sequence[int], matched: int, count: int) -> list[int] | None:
        """Reference the blocks of the first `matched` names and take `count - matched` more.

        Returns:  `count` block indices in prompt order; None if there are not enough, then nothing has changed.
        """
        by_name, idle, references = self._by_name, self._idle, self._references
        blocks = [by_name[name] for name in names[:matched]]
        num_idle = sum(block in idle for block in blocks)
        if count - matched + num_idle > self.free_blocks:
            return None
        for block in blocks:
            if not references[block]:
                del idle[block]
            references[block] += 1
        blocks += self.take(count - matched)
        return blocks

    def take(self, count: int) -> list[int]:
        """`count` unnamed blocks, referenced once.  Raises: IndexError for more than `free_blocks`."""
        free, references = self._free, self._references
        if len(free) < count:
            self._evict(count - len(free))
        split = len(free) - count
        blocks = free[split:]
        del free[split:]
        for block in blocks:
            references[block] = 1
        return blocks

    def _evict(self, count: int) -> None:
        if count > len(self._idle):
            raise IndexError(f"{count} more blocks are needed and {len(self._idle)} can be evicted")
        if self._stored:
            self.flush()  # events say what happened in the order in which it did
        names, by_name, idle = self._names, self._by_name, self._idle
        for _ in range(count):
            block, _none = idle.popitem(last=False)
            name = names[block]
            if name is not None:
                del by_name[name]
                self._removed.append(name)
            names[block] = None
            self._free.append(block)

    def store(self, blocks: Sequence[int], names: Sequence[int]) -> None:
        """These referenced blocks hold what `names` say, at the latest when the step that is being scheduled ends. A
        name already cached stays where it is.
        """
        by_name, block_names = self._by_name, self._names
        for block, name in zip(blocks, names, strict=True):
            if name not in by_name and block_names[block] is None:
                by_name[name] = block
                block_names[block] = name
                self._stored.append(name)
        self.version += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of a sequence, given in prompt order."""
        references, block_names, idle, free = self._references, self._names, self._idle, self._free
        for block in reversed(blocks):
            references[block] -= 1
            if not references[block]:
                if block_names[block] is None:
                    free.append(block)
                else:
                    idle[block] = None
        self.version += 1

    def flush(self) -> None:
        """Tell what came and went since the last flush."""
        events: list[KvEvent] = []
        if self._removed:
            events.append(BlocksRemoved(struct.pack(f"<{len(self._removed)}Q", *self._removed)))
            self._removed = []
        if self._stored:
            events.append(BlocksStored(struct.pack(f"<{len(self._stored)}Q", *self._stored)))
            self._stored = []
        if events:
            self._on_events(events)

    def cached_names(self) -> Hashes:
        """Names of all cached blocks, in no order."""
        return np.fromiter(self._by_name, dtype=np.uint64, count=len(self._by_name))
