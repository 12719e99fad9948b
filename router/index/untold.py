"""Blocks that a worker holds, or soon will, and has not told of: those of prompts that this gateway has sent there.

A worker tells of its blocks when the step that computed them has ended, over another way than its tokens come by. A
client that has its first token may send what begins alike before the gateway has heard of the blocks.

| a prompt is        | on                                            | after that                              |
|--------------------|-----------------------------------------------|-----------------------------------------|
| bound              | `add`                                         | its blocks count where it is computed   |
| computed           | `computed`                                    | until that worker has told of them      |
| not computed       | `drop`                                        | no longer                               |
"""

import math
from collections.abc import Callable
from itertools import islice

import numpy as np

from planes.wire.blocks import Hashes
from planes.wire.messages import RequestId, WorkerId

_MAX_COMPARED = 64  # prompts of a worker that begin alike, with which a new one is compared block by block
_PATIENCE_S = 1.0  # a worker that had nothing new to tell says nothing
_MOST_COMPUTED = 64  # prompts of a worker that it has not told of


class _Prompt:
    """last: its last block.  some: those by which it is found."""

    __slots__ = ("blocks", "computed_at", "last", "request", "some", "worker")

    def __init__(self, request: RequestId, worker: WorkerId, blocks: Hashes) -> None:
        self.request = request
        self.worker = worker
        self.blocks = blocks
        self.some = _some(blocks)
        self.last = int(blocks[-1])
        self.computed_at = math.inf


class UntoldBlocks:
    """The prompts under way, by some of their blocks: the first, second, fourth, eighth … of each.

    A name stands for all blocks up to it, so prompts with the same one begin alike; many have the same first ones.
    """

    def __init__(self) -> None:
        self._prompts: dict[RequestId, _Prompt] = {}
        self._alike: list[dict[int, dict[WorkerId, dict[RequestId, _Prompt]]]] = []
        self._computed: dict[WorkerId, list[_Prompt]] = {}
        self.changes = 0
        """Grows with all that `match` looks at."""

    def __len__(self) -> int:
        """Prompts under way."""
        return len(self._prompts)

    def add(self, request: RequestId, worker: WorkerId, blocks: Hashes) -> None:
        """A prompt was sent to a worker that will compute it. The same request again: the later one counts."""
        self.drop(request)
        if len(blocks):
            self.changes += 1
            prompt = self._prompts[request] = _Prompt(request, worker, blocks)
            while len(self._alike) < len(prompt.some):
                self._alike.append({})
            for level, name in enumerate(prompt.some):
                self._alike[level].setdefault(name, {}).setdefault(worker, {})[request] = prompt

    def computed(self, request: RequestId, now: float) -> None:
        """It is known to be computed: the worker will tell soon. Unknown requests are ignored, as `drop` does."""
        prompt = self._prompts.get(request)
        if prompt is not None and prompt.computed_at == math.inf:
            prompt.computed_at = now
            computed = self._computed.setdefault(prompt.worker, [])
            computed.append(prompt)
            if len(computed) > _MOST_COMPUTED or computed[0].computed_at <= now - _PATIENCE_S:
                self._end(prompt.worker, lambda each: each is computed[0] or each.computed_at <= now - _PATIENCE_S)

    def drop(self, request: RequestId) -> None:
        prompt = self._prompts.pop(request, None)
        if prompt is None:
            return
        self.changes += 1
        for level, name in enumerate(prompt.some):
            workers = self._alike[level][name]
            alike = workers[prompt.worker]
            del alike[request]
            if not alike:
                del workers[prompt.worker]
                if not workers:
                    del self._alike[level][name]

    def told(self, worker: WorkerId, holds: Callable[[WorkerId, int], bool]) -> None:
        """The worker has told of some blocks.  holds: whether it is now known to hold a block."""
        self._end(worker, lambda prompt: holds(worker, prompt.last))

    def gone(self, worker: WorkerId) -> None:
        """What was sent there is lost."""
        for request in [request for request, prompt in self._prompts.items() if prompt.worker == worker]:
            self.drop(request)
        self._computed.pop(worker, None)

    def forget(self, worker: WorkerId, now: float) -> None:
        """What was computed there long ago has been told of, or never will be."""
        self._end(worker, lambda prompt: prompt.computed_at <= now - _PATIENCE_S)

    def _end(self, worker: WorkerId, is_over: Callable[[_Prompt], bool]) -> None:
        left: list[_Prompt] = []
        for prompt in self._computed.pop(worker, ()):
            if not is_over(prompt):
                left.append(prompt)
            elif self._prompts.get(prompt.request) is prompt:
                self.drop(prompt.request)
        if left:
            self._computed[worker] = left

    def match(self, blocks: Hashes) -> dict[WorkerId, int]:
        """How many leading blocks of a prompt each worker will hold by those under way; 0 is left out."""
        found: dict[WorkerId, int] = {}
        some = _some(blocks)
        for level in range(min(len(some), len(self._alike)) - 1, -1, -1):
            workers = self._alike[level].get(some[level])
            if workers:
                for worker, alike in workers.items():
                    if worker not in found:
                        found[worker] = _deepest(alike, blocks, 1 << level)
        return found


def _some(blocks: Hashes) -> list[int]:
    """The names of the first, second, fourth, eighth … block."""
    return [int(blocks[(1 << level) - 1]) for level in range(len(blocks).bit_length())]


def _deepest(alike: dict[RequestId, _Prompt], blocks: Hashes, depth: int) -> int:
    """Most leading blocks that any of these prompts shares.  depth: so many they all do, and none twice as many."""
    most = min(2 * depth - 1, len(blocks))
    for prompt in islice(reversed(alike.values()), _MAX_COMPARED):
        if depth == most:
            break
        until = min(len(prompt.blocks), most)
        if depth < until and prompt.blocks[depth] == blocks[depth]:
            depth += int(np.count_nonzero(prompt.blocks[depth:until] == blocks[depth:until]))
    return depth
