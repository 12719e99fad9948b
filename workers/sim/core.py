"""The simulated engine's scheduler and clock-free heart: continuous batching over a paged KV cache.

`SimCore` computes nothing but decides everything: which requests run in a step, how long the step takes, which blocks
they hold, which tokens come out. It is synchronous and takes `now` (seconds, any origin) as an argument, so the same
code serves real clients (`engine.py`) and a virtual clock (`loadtest/simulate.py`). The driver's loop:

    core.submit(...)                     # at any time; so are abort, handover_arrived and release_lease
    while core.busy_until is None and core.begin_step(now=now) is not None:
        ... wait until core.busy_until ...
        outputs = core.end_step(now=core.busy_until)

With `horizon` given, `begin_step` may run several decode steps as one (same totals, fewer calls). Whatever happens to
the core meanwhile cuts that run to the whole steps that had begun: after calling any method, look at `busy_until`.

Scheduling follows vLLM's V1 scheduler in spirit: running decodes first, one token each, then prefill chunks, oldest
first (with `facts.is_shortest_first` as our plug-in has it), then waiting requests by (priority, arrival), all within
`max_step_tokens`; a request is admitted when `max_batch` allows and the blocks of its whole prompt fit, and begins
after what is cached or will be filled by prompts scheduled before it in that step; when blocks run out the latest
request is preempted and computed again later. Step seconds follow `LatencyPrior`, which for the simulated engine is no
guess but the truth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from planes.wire.blocks import Hashes, continue_each
from planes.wire.frames import FinishReason
from planes.wire.messages import EngineFacts, KvEvent, LatencyPrior, RequestId, StepSample
from workers.engine.base import EngineLoad
from workers.sim.cache import SimCache
from workers.sim.request import KvMemory, SimLeg, SimOutput, SimReport, SimRequest
from workers.sim.scheduler import EngineQueueFull, SimScheduler
from workers.sim.sequence import Sequence, State, corruption
from workers.sim.steps import Steps
from workers.sim.tokens import key_of, word_of

__all__ = ["EngineQueueFull", "KvMemory", "SimCore", "SimLeg", "SimOutput", "SimReport", "SimRequest"]


@dataclass(slots=True)
class _Harvest:
    """What a run of steps gave."""

    now: float
    outputs: list[SimOutput] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    filled: list[Sequence] = field(default_factory=list)
    """Those whose last block is full of tokens now."""


class SimCore:
    """One engine. Not thread-safe; bounded by `facts` and `max_waiting`."""

    def __init__(
        self,
        facts: EngineFacts,
        speed: LatencyPrior,
        *,
        model: str,
        on_events: Callable[[list[KvEvent]], None],
        seed: int = 0,
        memory: KvMemory | None = None,
        max_waiting: int = 65536,
    ) -> None:
        """`seed` and `model` choose the token function; engines that shall continue each other's streams agree on them.

        on_events: called from within the methods below, after the blocks changed.  memory: if given, tokens are drawn
        from the words read there rather than from the request's own names.
        Raises:  ValueError if one request of `context_length` could never fit, or a full batch not in one step.
        """
        _check_facts(facts)
        self.facts = facts
        self._size = facts.block_size
        # A vector stands for a token here, of which nothing is kept.
        self._most_tokens = facts.context_length + (1 if facts.embedding_size else 0)
        self._key = key_of(model, seed)
        self._memory = memory
        self._cache = SimCache(facts.num_blocks, on_events=on_events)
        self._scheduler = SimScheduler(facts, self._cache, max_waiting=max_waiting)
        self._steps = Steps(speed)
        self._order = 0
        self._admitted: list[RequestId] = []
        self._chunks: list[tuple[Sequence, int]] = []
        self._aborted: list[Sequence] = []

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: SimRequest, *, now: float) -> None:
        """Queue a request. A decode leg gets its blocks here at once if it can: see `take_admitted`.

        Raises:  EngineQueueFull; ValueError if it can never run here, if the id is in use, or if names, tokens and
        counts disagree.
        """
        length = request.prompt_tokens + request.resume_tokens
        self._check(request, length)
        left = 1 if request.leg is SimLeg.PREFILL else request.max_tokens - request.resume_tokens
        left = min(left, self._most_tokens - length)
        self._scheduler.add(Sequence(request, self._order, left=left, key=request.key ^ self._key, now=now))
        self._order += 1
        self._cut(now)
        if request.leg is SimLeg.DECODE:
            self._admitted += [sequence.request.request for sequence in self._scheduler.admit_remote().remote]
            self._cache.flush()

    def _check(self, request: SimRequest, length: int) -> None:
        limit = self._most_tokens
        if request.prompt_tokens < 1 or length >= limit:
            raise ValueError(f"the input has {length} tokens; 1 to {limit - 1} and one to complete fit the context")
        if request.max_tokens <= request.resume_tokens:
            raise ValueError(f"max_tokens is {request.max_tokens}; {request.resume_tokens} tokens are there already")
        if request.leg is SimLeg.DECODE and not 1 <= request.remote_tokens <= length:
            raise ValueError(f"{request.remote_tokens} tokens of KV cache are offered for an input of {length}")
        if request.request in self._scheduler.sequences or request.request in self._scheduler.leases:
            raise ValueError(f"request id {request.request} is in use")
        num_names, full = len(request.names), length // self._size
        if request.tokens is None:
            if num_names > full:
                raise ValueError(f"{num_names} block names are more than the {full} full blocks of {length} tokens")
        elif num_names != full or len(request.tokens) != length:
            raise ValueError(
                f"{num_names} block names and {len(request.tokens)} tokens do not fit an input of {length} tokens"
            )

    def take_admitted(self) -> list[RequestId]:
        """Decode legs that got their blocks since the last call: begin their handover now. Look after `submit` and
        `begin_step`.
        """
        admitted, self._admitted = self._admitted, []
        return [request for request in admitted if request in self._scheduler.sequences]

    def missing_blocks(self, request: RequestId) -> int:
        """Blocks that a decode leg needs from elsewhere: the last ones of `remote_tokens`, those not cached here.

        Final once it was reported by `take_admitted`, a forecast before.  Raises: KeyError if unknown.
        """
        return self._scheduler.missing(self._scheduler.sequences[request])

    def blocks_of(self, request: RequestId) -> list[int]:
        """Indices of the blocks that a request holds, in prompt order: running, or a prefill leg under lease.

        Raises:  KeyError if unknown.
        """
        sequence = self._scheduler.sequences.get(request)
        return list(self._scheduler.leases[request] if sequence is None else sequence.blocks)

    def handover_arrived(self, request: RequestId, *, now: float) -> None:
        """The KV cache of a decode leg is here: it may run. Unknown ids are ignored (it may have been aborted)."""
        sequence = self._scheduler.sequences.get(request)
        if sequence is None or sequence.state is not State.REMOTE:
            return
        self._cut(now)
        sequence.arrived_at, sequence.has_arrived = now, True
        remote = sequence.request.remote_tokens
        if self._memory is not None and sequence.has_tokens:
            expected = sequence.names[: remote // self._size]
            if remote % self._size:
                expected.append(word_of(sequence.state_at(remote, self._size)))
            sequence.corruption = self._corruption(self._memory, sequence, expected)
        matched, full = sequence.computed // self._size, min(remote // self._size, len(sequence.names))
        if full > matched:
            self._cache.store(sequence.blocks[matched:full], sequence.names[matched:full])
            self._cache.flush()
        sequence.computed = max(sequence.computed, min(remote, sequence.length - 1))
        self._scheduler.arrive(sequence)

    def _corruption(self, memory: KvMemory, sequence: Sequence, expected: list[int]) -> int:
        words = memory.read(sequence.blocks[: len(expected)])
        return corruption(words, np.array(expected, dtype=np.uint64))

    def abort(self, request: RequestId, *, now: float) -> None:
        """Forget a request; a lease of that id ends as well. Unknown ids are ignored.

        Nothing more comes out of it, tokens of a run in progress included.
        """
        self.release_lease(request, now=now)
        sequence = self._scheduler.sequences.get(request)
        if sequence is None or sequence in self._aborted:
            return
        self._cut(now)
        if sequence.state is State.RUNNING and self.busy_until is not None:
            self._aborted.append(sequence)  # the step in progress still uses its blocks
        else:
            self._scheduler.remove(sequence)

    def release_lease(self, request: RequestId, *, now: float) -> None:
        """A finished prefill leg's blocks were taken, or its lease ran out. Unknown ids are ignored."""
        if request in self._scheduler.leases:
            self._cut(now)
            self._scheduler.release_lease(request)

    # --- steps ---------------------------------------------------------------------------------------------------

    @property
    def busy_until(self) -> float | None:
        """Instant at which the run of steps in progress ends; None: no step is in progress."""
        return self._steps.busy_until

    @property
    def step_ends(self) -> list[float]:
        """Instants at which the steps of the last ended run ended, ascending."""
        return self._steps.last_ends

    @property
    def slowdown(self) -> float:
        return self._steps.slowdown

    def set_slowdown(self, factor: float, *, now: float) -> None:
        """Every step that begins from now on takes `factor` times as long."""
        self._cut(now)
        self._steps.slowdown = factor

    def begin_step(self, *, now: float, horizon: float | None = None) -> float | None:
        """Schedule a step. Returns its seconds; None if nothing can be computed now.

        horizon: run on while only decodes run (without token ids), nobody could be admitted, nobody finishes and
        steps begin before this instant; returns the seconds of all of them. `math.inf` is fine.
        Raises:  RuntimeError if a step is in progress.
        """
        if self.busy_until is not None:
            raise RuntimeError(f"a step is in progress until {self.busy_until}")
        scheduler = self._scheduler
        batch = scheduler.schedule()
        self._chunks = batch.chunks
        self._admitted += [sequence.request.request for sequence in batch.remote]
        for sequence, _ in batch.chunks:
            if sequence.scheduled_at < 0:
                sequence.scheduled_at = now
        self._write(*batch.filled)
        if not batch.chunks:
            self._cache.flush()  # else at the end of the step at the latest, as vLLM does
        if not batch.chunks and not scheduler.decoding:
            return None
        is_run = horizon is not None and not batch.chunks and not batch.has_preempted
        self._begin(now, scheduler.most_steps() if is_run else 1, math.inf if horizon is None else horizon)
        return self._steps.ends[-1] - now

    def _begin(self, now: float, most: int, horizon: float) -> None:
        """Time the step. A chunk of one token costs what a decode costs, and is counted as one."""
        batch, kv_tokens, prefill, pairs = len(self._scheduler.decoding), self._scheduler.kv_tokens, 0, 0
        for sequence, tokens in self._chunks:
            if tokens == 1:
                batch += 1
                kv_tokens += sequence.computed + 1
            else:
                prefill += tokens
                pairs += tokens * sequence.computed + tokens * (tokens + 1) // 2
        self._steps.begin(now, prefill, pairs, batch, kv_tokens, most=most, horizon=horizon)

    def _cut(self, now: float) -> None:
        """Something happens at `now`: a run of several steps ends with the one that had begun by then."""
        if len(self._steps.ends) > 1:
            self._steps.cut(now)
            self._scheduler.reserve(len(self._steps.ends))

    def end_step(self, *, now: float) -> list[SimOutput]:
        """Results of the run in progress. `now` is `busy_until`, or later if the caller was late.

        Raises:  RuntimeError if no step is in progress.
        """
        if self.busy_until is None:
            raise RuntimeError("no step is in progress")
        num_steps = self._steps.end()
        if num_steps > 1:
            self._scheduler.reserve(num_steps)
        if self._aborted:
            self._drop_aborted()
        harvest = _Harvest(now)
        self._decode(num_steps, harvest)
        for sequence, tokens in self._chunks:
            sequence.computed += tokens
            if sequence.computed == sequence.length:
                self._draw_first(sequence, harvest)
        self._name(harvest.filled)
        self._finish(harvest.finished)
        self._chunks = []
        self._cache.flush()
        return harvest.outputs

    def _drop_aborted(self) -> None:
        aborted, self._aborted = self._aborted, []
        for sequence in aborted:
            self._scheduler.remove(sequence)
        self._chunks = [chunk for chunk in self._chunks if chunk[0].state is State.RUNNING]

    def _decode(self, steps: int, harvest: _Harvest) -> None:
        """Each decoding sequence has computed its last token's KV `steps` times, and drawn as many tokens."""
        scheduler, full = self._scheduler, []
        for sequence in scheduler.decoding:
            sequence.computed += steps
            if sequence.computed == sequence.capacity and sequence.has_tokens:
                full.append(sequence)
            self._draw(sequence, steps, harvest)
        scheduler.kv_tokens += steps * len(scheduler.decoding)
        if full:
            blocks, names = [s.blocks[-1] for s in full], [s.names[s.capacity // self._size - 1] for s in full]
            self._write(blocks, names)
            self._cache.store(blocks, names)

    def _draw(self, sequence: Sequence, steps: int, harvest: _Harvest, *, is_first: bool = False) -> None:
        sequence.length += steps
        sequence.left -= steps
        finish: FinishReason | None = None
        tokens: tuple[int, ...] = ()
        if sequence.has_tokens:
            tokens = sequence.next_token()
            if sequence.has_stops or not sequence.left:
                finish = sequence.finish_after(tokens[0])
            if finish is None and len(sequence.tail) == self._size:
                harvest.filled.append(sequence)
        elif not sequence.left:
            finish = FinishReason.LENGTH
        report = sequence.report(harvest.now) if is_first or finish is not None else None
        if finish is not None:
            sequence.has_ended_early = finish is FinishReason.STOP
            harvest.finished.append(sequence)
        harvest.outputs.append(SimOutput(sequence.request.request, steps, tokens, finish, report, sequence.entropy))

    def _draw_first(self, sequence: Sequence, harvest: _Harvest) -> None:
        """All tokens so far are computed: the first draw, or the first after a preemption."""
        is_first = sequence.first_token_at < 0
        if is_first:
            sequence.first_token_at = harvest.now
        if sequence.has_tokens and sequence.chain is None:
            self._start_chain(sequence)
        self._draw(sequence, 1, harvest, is_first=is_first)
        self._scheduler.decode(sequence)

    def _start_chain(self, sequence: Sequence) -> None:
        memory, full = self._memory, sequence.length // self._size
        if memory is not None and not sequence.has_arrived:
            sequence.corruption = self._corruption(memory, sequence, sequence.names[:full])
        sequence.start_chain(self._size)
        if memory is not None and sequence.request.leg is SimLeg.PREFILL and sequence.length % self._size:
            memory.write(sequence.blocks[-1:], np.array([word_of(sequence.chain or 0)], dtype=np.uint64))

    def _write(self, blocks: list[int], names: list[int]) -> None:
        if self._memory is not None and blocks:
            self._memory.write(blocks, np.array(names, dtype=np.uint64))

    def _name(self, filled: list[Sequence]) -> None:
        """Name the blocks that the tokens just drawn fill up; they are stored when their last token is computed."""
        if not filled:
            return
        parents = np.array([s.names[-1] if s.names else s.request.root for s in filled], dtype=np.uint64)
        depths = np.array([len(s.names) for s in filled])
        tails = np.array([s.tail for s in filled], dtype=np.uint32)
        for sequence, name in zip(filled, continue_each(parents, depths, tails).tolist(), strict=True):
            sequence.named(name)

    def _finish(self, finished: list[Sequence]) -> None:
        """A prefill leg that its first token did not end keeps its blocks under lease."""
        if finished:
            leased = [s for s in finished if s.request.leg is SimLeg.PREFILL and not s.has_ended_early]
            self._scheduler.finish([s for s in finished if s not in leased], leased=leased)

    # --- answers about itself ------------------------------------------------------------------------------------

    def load(self, *, now: float | None = None) -> EngineLoad:
        """A glance; with `now`, steps of the run in progress that have ended by then count."""
        scheduler = self._scheduler
        in_run = len(self._steps.ends) if len(self._steps.ends) > 1 else 0
        ended = 0 if now is None else min(in_run, self._steps.ended_by(now))
        computed = sum(sequence.computed for sequence in scheduler.prefilling)
        num_running = len(scheduler.decoding) + len(scheduler.prefilling)
        return EngineLoad(
            num_running=num_running,
            num_waiting=len(scheduler.sequences) - num_running,
            waiting_prefill_tokens=scheduler.uncomputed_tokens,
            free_blocks=self._cache.free_blocks - scheduler.num_needed(min(in_run, ended + 1)),
            kv_tokens=scheduler.kv_tokens + ended * len(scheduler.decoding) + computed,
        )

    @property
    def num_leases(self) -> int:
        """Finished prefill legs whose blocks are still pinned."""
        return len(self._scheduler.leases)

    @property
    def last_sample(self) -> StepSample | None:
        """The last step that ended."""
        return self._steps.last_sample

    def take_samples(self) -> list[StepSample]:
        """Steps that ended since the last call, newest last, at most 256: what a load report wants."""
        return self._steps.take_samples()

    def cached_names(self) -> Hashes:
        """Names of all blocks in the prefix cache, as events tell it by the end of the step in progress; any order."""
        return self._cache.cached_names()


def _check_facts(facts: EngineFacts) -> None:
    if facts.num_blocks * facts.block_size < facts.context_length:
        raise ValueError(
            f"{facts.num_blocks} blocks of {facts.block_size} tokens cannot hold one request of "
            f"{facts.context_length} tokens: raise num_blocks or lower context_length"
        )
    if facts.max_step_tokens < facts.max_batch:
        raise ValueError(
            f"max_step_tokens {facts.max_step_tokens} is less than max_batch {facts.max_batch}: a full batch "
            f"could not decode one token each"
        )
