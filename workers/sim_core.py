"""The simulated engine's scheduler and clock-free heart: continuous batching over a paged KV cache.

`SimCore` computes nothing but decides everything: which requests run in a step, how long the step takes, which blocks
they hold, which tokens come out. It is synchronous and takes `now` (seconds, any origin) as an argument, so the same
code serves real clients (`sim_engine.py`) and a virtual clock (`loadtest/simulate.py`). The driver's loop:

    core.submit(...)                     # at any time; so are abort, handover_arrived and release_lease
    while core.busy_until is None and core.begin_step(now=now) is not None:
        ... wait until core.busy_until ...
        outputs = core.end_step(now=core.busy_until)

With `horizon` given, `begin_step` may run several decode steps as one (same totals, fewer calls). Whatever happens to
the core meanwhile cuts that run to the whole steps that had begun: after calling any method, look at `busy_until`.

Scheduling follows vLLM's V1 scheduler in spirit: running decodes first, one token each, then prefill chunks, oldest
first, then waiting requests by (priority, arrival), all within `max_step_tokens`; a request is admitted when
`max_batch` allows and the blocks of its whole prompt fit; when blocks run out the latest request is preempted and
computed again later. Step seconds follow `LatencyPrior`, which for the simulated engine is no guess but the truth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from planes.blocks import Hashes
from planes.frames import FinishReason
from planes.messages import EngineFacts, KvEvent, LatencyPrior, RequestId, StepSample
from workers.engine import EngineLoad


class SimLeg(StrEnum):
    """Which part of a request is run here."""

    LOCAL = "local"
    PREFILL = "prefill"
    """Prompt and one token; the blocks stay pinned until `release_lease`."""
    DECODE = "decode"
    """The KV cache of the first `remote_tokens` comes from elsewhere: see `handover_arrived`."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One sequence to run.

    names: names of the full blocks of the input (prompt + resume), `planes.blocks.name_blocks`.
    tokens: the input itself, shape (prompt_tokens + resume_tokens,); None: lengths only, no tokens come out.
    max_tokens: completion tokens, `resume_tokens` included (as in `Sampling.max_tokens`).
    """

    request: RequestId
    prompt_tokens: int
    names: Hashes
    max_tokens: int
    resume_tokens: int = 0
    leg: SimLeg = SimLeg.LOCAL
    remote_tokens: int = 0
    """Decode leg: input tokens whose KV cache will arrive; at least 1, at most the input's length."""
    priority: int = 0
    """Lower is sooner."""
    tokens: npt.NDArray[np.uint32] | None = None
    root: int = 0
    """Name before the first block (`planes.blocks.root`); only used with `tokens`."""
    key: int = 0
    """Picks the token stream: a hash of seed and choice index; 0 is as good as any."""
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0
    natural_tokens: int = 0
    """Mean completion tokens until the model ends by itself with `EOS_TOKEN`; 0: never."""


@dataclass(frozen=True, slots=True)
class SimReport:
    """What a sequence went through; seconds and words as in `planes.frames.Usage`."""

    cached_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    handover_s: float
    handover_blocks: int
    """Decode leg: blocks that were moved."""
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class SimOutput:
    """What one run of steps gave one sequence.

    num_tokens: new tokens, one per step of the run that ended (see `SimCore.step_ends`), the last one in its last
    step; always 1 without `horizon`.  tokens: their ids, empty when the request has none.  finish, report: set on the
    sequence's last output.  entropy: 64 bits behind the last token's draw, for made-up log probabilities.
    """

    request: RequestId
    num_tokens: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    report: SimReport | None = None
    entropy: int = 0


class KvMemory(Protocol):
    """Where the simulated KV bytes lie: one 64-bit word per block, the name of what the block holds."""

    def write(self, blocks: Sequence[int], words: Hashes) -> None: ...

    def read(self, blocks: Sequence[int]) -> Hashes: ...


class SimCore:
    """One engine. Not thread-safe; bounded by `facts` and `max_waiting`."""

    slowdown: float
    """Every step takes this many times longer; may be changed at any time, counts from the next step."""
    busy_until: float | None
    """Instant at which the run of steps in progress ends; None: no step is in progress."""
    step_ends: list[float]
    """Instants at which the steps of the last ended run ended, ascending."""

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
        raise NotImplementedError

    def submit(self, request: SimRequest, *, now: float) -> None:
        """Queue a request. A decode leg gets its blocks here at once if it can: see `take_admitted`.

        Raises:  InvalidRequest if it can never run here; QueueFull; ValueError if the id is in use.
        """
        raise NotImplementedError

    def take_admitted(self) -> list[RequestId]:
        """Decode legs that got their blocks since the last call: begin their handover now. Check it after `submit`,
        `begin_step` and `end_step`.
        """
        raise NotImplementedError

    def missing_blocks(self, request: RequestId) -> int:
        """Blocks that a decode leg needs from elsewhere: all of the `remote_tokens` that are not cached here.

        Final once it was reported by `take_admitted`, a forecast before.  Raises: KeyError if unknown.
        """
        raise NotImplementedError

    def blocks_of(self, request: RequestId) -> list[int]:
        """Indices of the blocks that a request holds, in prompt order: running, or a prefill leg under lease.

        Raises:  KeyError if unknown.
        """
        raise NotImplementedError

    def handover_arrived(self, request: RequestId, *, now: float) -> None:
        """The KV cache of a decode leg is here: it may run. Unknown ids are ignored (it may have been aborted)."""
        raise NotImplementedError

    def abort(self, request: RequestId, *, now: float) -> None:
        """Forget a request; a lease of that id ends as well. Unknown ids are ignored."""
        raise NotImplementedError

    def release_lease(self, request: RequestId, *, now: float) -> None:
        """A finished prefill leg's blocks were taken, or its lease ran out. Unknown ids are ignored."""
        raise NotImplementedError

    def begin_step(self, *, now: float, horizon: float | None = None) -> float | None:
        """Schedule a step. Returns its seconds, None if there is nothing to compute (or only what waits for a handover).

        horizon: run on while only decodes run (without token ids), nobody could be admitted, nobody finishes and
        steps begin before this instant; returns the seconds of all of them. `math.inf` is fine.
        Raises:  RuntimeError if a step is in progress.
        """
        raise NotImplementedError

    def end_step(self, *, now: float) -> list[SimOutput]:
        """Results of the run begun, oldest request first. `now` is `busy_until`, or later if the caller was late."""
        raise NotImplementedError

    def load(self, *, now: float | None = None) -> EngineLoad:
        """A glance; with `now`, steps of the run in progress that have ended by then count."""
        raise NotImplementedError

    @property
    def last_sample(self) -> StepSample | None:
        """The last step that ended."""
        raise NotImplementedError

    def take_samples(self) -> list[StepSample]:
        """Steps that ended since the last call, newest last, at most 256: what a load report wants."""
        raise NotImplementedError

    def held(self) -> Hashes:
        """Names of all blocks in the prefix cache, as published by events; any order."""
        raise NotImplementedError
