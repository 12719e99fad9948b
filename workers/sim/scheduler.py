"""Who runs and who holds which blocks: queues, admission, growth, preemption and leases of the simulated engine.

Knows no clock and no tokens' values; `core.py` drives it. See `sequence.State` for the states.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

from planes.wire.errors import Rejected
from planes.wire.messages import EngineFacts, RequestId
from workers.sim.cache import SimCache
from workers.sim.sequence import Sequence, State


class EngineQueueFull(Rejected):
    """The engine's waiting queue has reached its limit."""

    code = "queue_full"

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} requests are waiting at this worker and the limit is {limit}; send it elsewhere")


@dataclass(slots=True)
class Batch:
    """What `schedule` decided, beside one token for each decoding sequence."""

    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    """Prompts, with the tokens of each to compute in this step."""
    filled: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    """Blocks that these fill, and their names."""
    remote: list[Sequence] = field(default_factory=list)
    """Decode legs that got their blocks: their KV cache may come."""
    has_preempted: bool = False


def _left(sequence: Sequence) -> int:
    """Prompt tokens still to be computed."""
    return sequence.length - sequence.computed


class SimScheduler:
    """Queues and blocks of one engine. `prefilling` and `decoding` are the running sequences, first admitted first."""

    def __init__(self, facts: EngineFacts, cache: SimCache, *, max_waiting: int) -> None:
        self.cache = cache
        self.sequences: dict[RequestId, Sequence] = {}
        """All that are waiting, remote, arrived or running."""
        self.leases: dict[RequestId, list[int]] = {}
        """Blocks of finished prefill legs."""
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        """Those with exactly one token left to compute, and at least one drawn."""
        self.kv_tokens = 0
        """Tokens of all of `decoding`."""
        self.num_waiting = 0
        self.waiting_tokens = 0
        """Of those in state WAITING."""
        self._facts = facts
        self._size = facts.block_size
        self._max_waiting = max_waiting
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._arrived: deque[Sequence] = deque()
        self._blocked: tuple[Sequence, int] | None = None
        self._was_short = self._was_aside = False

    # --- continuous batching -------------------------------------------------------------------------------------

    def schedule(self) -> Batch:
        """One step: all that decode, one token each; then prompts that have begun; then whoever waits.

        Where blocks run out, the latest sequence is preempted and nobody is admitted.
        """
        batch = Batch(has_preempted=self._grow())
        budget = self._facts.max_step_tokens - len(self.decoding)
        most, is_aside = budget, False
        if self._facts.is_shortest_first and not batch.has_preempted:
            most, is_aside = self._shared(budget)
        for sequence in () if is_aside else self.prefilling:
            if budget <= 0:
                break
            budget -= self._compute(batch, sequence, min(budget, most))
        if not batch.has_preempted:
            self._admit(batch, budget, most)
        if batch.chunks:
            self._was_short, self._was_aside = most == 1, is_aside
        return batch

    def _shared(self, budget: int) -> tuple[int, bool]:
        """Of a step that goes to the shortest prompt first: most tokens for a prompt, and whether those that have begun
        are left out of it.

        They are, by a shorter one that waits, where all have a seat. A KV cache that has arrived gets a step next to
        without prompts. Neither comes twice in a row; then prompts share what is left. As the scheduler of
        `workers/vllm/plugin` does it (ADR 22).
        """
        self.prefilling.sort(key=_left)
        first, num_prompts = self._first(), len(self.prefilling)
        is_shorter = (
            num_prompts > 0
            and first is not None
            and not first.needs_remote
            and first.length < _left(self.prefilling[0])
        )
        if self._arrived and not self._was_short:
            return 1, False
        has_seats = len(self.decoding) + num_prompts + self.num_waiting <= self._facts.max_batch
        if is_shorter and not self._arrived and not self._was_aside and has_seats:
            return budget, True
        if is_shorter or self._arrived:
            return max(1, budget // (num_prompts + 1)), False
        return budget, False

    def admit_remote(self) -> Batch:
        """Between two steps: give blocks to decode legs that are next in the queue."""
        batch = Batch()
        self._admit(batch, budget=0, most=0)
        return batch

    def _admit(self, batch: Batch, budget: int, most: int) -> None:
        """As far as seats, blocks and `budget` tokens allow: first whose KV cache has arrived, then who waits.

        most: tokens for each of them.
        """
        seats = self._facts.max_batch - len(self.decoding) - len(self.prefilling)
        while self._arrived and seats > 0 and budget > 0:
            budget -= self._compute(batch, self._run(self._arrived.popleft()), min(budget, most))
            seats -= 1
        while (sequence := self._first()) is not None:
            is_remote = sequence.needs_remote  # it takes blocks, and neither a seat nor tokens yet
            if not is_remote and (seats <= 0 or budget <= 0):
                break
            if not self._allocate(sequence):
                break
            self._pop(sequence)
            if is_remote:
                sequence.needs_remote, sequence.state = False, State.REMOTE
                batch.remote.append(sequence)
            else:
                budget -= self._compute(batch, self._run(sequence), min(budget, most))
                seats -= 1

    def _compute(self, batch: Batch, sequence: Sequence, most: int) -> int:
        """Compute what is left of a prompt, up to `most` tokens. Returns how many that are.

        Blocks that this fills have their names at once, so that prompts scheduled after it share them in this very
        step, as in vLLM: a step writes KV before it reads any.
        """
        tokens = min(most, _left(sequence))
        batch.chunks.append((sequence, tokens))
        blocks, names = sequence.filled_by(tokens, self._size)
        if blocks:
            self.cache.store(blocks, names)
            batch.filled[0].extend(blocks)
            batch.filled[1].extend(names)
        return tokens

    def _run(self, sequence: Sequence) -> Sequence:
        sequence.state = State.RUNNING
        self.prefilling.append(sequence)
        return sequence

    def decode(self, sequence: Sequence) -> None:
        """A prompt is computed: from prefilling to decoding."""
        self.prefilling.remove(sequence)
        self.decoding.append(sequence)
        self.kv_tokens += sequence.length

    # --- the waiting queue ---------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Raises:  EngineQueueFull."""
        if self.num_waiting >= self._max_waiting:
            raise EngineQueueFull(self.num_waiting, self._max_waiting)
        self.sequences[sequence.request.request] = sequence
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        heapq.heappush(self._waiting, (sequence.request.priority, sequence.order, sequence))
        self.num_waiting += 1
        self.waiting_tokens += sequence.length

    def _first(self) -> Sequence | None:
        waiting = self._waiting
        while waiting and waiting[0][2].state is not State.WAITING:
            heapq.heappop(waiting)
        return waiting[0][2] if waiting else None

    def _pop(self, sequence: Sequence) -> None:
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        self.waiting_tokens -= sequence.length

    def arrive(self, sequence: Sequence) -> None:
        """A remote sequence has its KV cache."""
        sequence.state = State.ARRIVED
        self._arrived.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence in any state and drop its blocks."""
        del self.sequences[sequence.request.request]
        was, sequence.state = sequence.state, State.GONE
        if was is State.WAITING:
            self.num_waiting -= 1
            self.waiting_tokens -= sequence.length
            if len(self._waiting) > 2 * self.num_waiting + 64:  # else it goes when it reaches the heap's top
                self._waiting = [entry for entry in self._waiting if entry[2].state is State.WAITING]
                heapq.heapify(self._waiting)
            return
        if was is State.RUNNING:
            self._stop(sequence)
        elif was is State.ARRIVED:
            self._arrived.remove(sequence)
        self.cache.release(sequence.blocks)

    def finish(self, finished: list[Sequence], *, leased: list[Sequence]) -> None:
        """These running sequences have ended; the blocks of `leased` ones stay until `release_lease`."""
        for sequence in finished:
            del self.sequences[sequence.request.request]
            sequence.state = State.GONE
            self.cache.release(sequence.blocks)
        for sequence in leased:
            del self.sequences[sequence.request.request]
            sequence.state = State.GONE
            self.leases[sequence.request.request] = sequence.blocks
        self.kv_tokens -= sum(sequence.length for sequence in self.decoding if sequence.state is State.GONE)
        self.decoding = [sequence for sequence in self.decoding if sequence.state is State.RUNNING]

    def release_lease(self, request: RequestId) -> None:
        blocks = self.leases.pop(request, None)
        if blocks is not None:
            self.cache.release(blocks)

    # --- blocks --------------------------------------------------------------------------------------------------

    def missing(self, sequence: Sequence) -> int:
        """Blocks of the remote tokens that are not held here."""
        if sequence.blocks:
            return sequence.handover_blocks
        return max(0, -(-sequence.request.remote_tokens // self._size) - self._match(sequence))

    def _match(self, sequence: Sequence) -> int:
        """Leading blocks cached; the last token is always computed."""
        return self.cache.match(sequence.names, (sequence.length - 1) // self._size)

    def _allocate(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks of all its tokens, if they are there."""
        if self._blocked == (sequence, self.cache.version):
            return False
        matched = self._match(sequence)
        blocks = self.cache.acquire(sequence.names, matched, -(-sequence.length // self._size))
        if blocks is None:
            self._blocked = (sequence, self.cache.version)
            return False
        sequence.handover_blocks = max(0, -(-sequence.request.remote_tokens // self._size) - matched)
        sequence.blocks = blocks
        sequence.capacity = len(blocks) * self._size
        sequence.computed = matched * self._size
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
        return True

    def _grow(self) -> bool:
        """Give a block to each decoding sequence that needs one for its next token. Returns whether that cost
        somebody else theirs.
        """
        needy = [sequence for sequence in self.decoding if sequence.computed == sequence.capacity]
        has_preempted = False
        while len(needy) > self.cache.free_blocks:
            victim = max(self.decoding + self.prefilling, key=lambda s: (s.request.priority, s.order))
            self._preempt(victim)
            has_preempted = True
            needy = [sequence for sequence in needy if sequence is not victim]
        self._give(needy, [1] * len(needy))
        return has_preempted

    def _give(self, sequences: list[Sequence], counts: list[int]) -> None:
        blocks = self.cache.take(sum(counts))
        for sequence, count in zip(sequences, counts, strict=True):
            if count:
                sequence.blocks += blocks[-count:]
                del blocks[-count:]
                sequence.capacity += count * self._size

    def _preempt(self, victim: Sequence) -> None:
        """Recompute it later. What it drew is kept; a KV cache that was handed over is computed here then."""
        self._stop(victim)
        self.cache.release(victim.blocks)
        victim.blocks, victim.capacity, victim.computed = [], 0, 0
        victim.num_preemptions += 1
        self._wait(victim)

    def _stop(self, sequence: Sequence) -> None:
        if sequence in self.decoding:
            self.decoding.remove(sequence)
            self.kv_tokens -= sequence.length
        else:
            self.prefilling.remove(sequence)

    # --- runs of several decode steps ----------------------------------------------------------------------------

    def most_steps(self) -> int:
        """Decode steps for which nobody finishes before the last, and the blocks suffice; at least 1."""
        if any(sequence.has_tokens for sequence in self.decoding):
            return 1
        most = min(sequence.left for sequence in self.decoding)
        fits, free = 1, self.cache.free_blocks
        if sum(self._needs(most)) <= free:
            return most
        while most - fits > 1:
            middle = (most + fits) // 2
            fits, most = (middle, most) if sum(self._needs(middle)) <= free else (fits, middle)
        return fits

    def _needs(self, steps: int) -> list[int]:
        """Blocks that each decoding sequence takes in `steps` steps, beyond what it has."""
        size = self._size
        return [max(0, -((s.capacity - s.computed - steps) // size)) for s in self.decoding]

    def num_needed(self, steps: int) -> int:
        """Blocks that `steps` decode steps take."""
        return sum(self._needs(steps))

    def reserve(self, steps: int) -> None:
        """Take the blocks of `steps` decode steps."""
        self._give(self.decoding, self._needs(steps))

    @property
    def uncomputed_tokens(self) -> int:
        """Prompt tokens accepted and not computed yet; a decode leg has its last one to compute once it has arrived."""
        running = sum(sequence.length - sequence.computed for sequence in self.prefilling)
        return self.waiting_tokens + running
