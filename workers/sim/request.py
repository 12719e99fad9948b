"""What goes into and comes out of the simulated engine's core."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from planes.wire.blocks import Hashes
from planes.wire.frames import DecodeLeg, FinishReason, Leg, PrefillLeg
from planes.wire.messages import RequestId


class SimLeg(StrEnum):
    """Which part of a request is run here."""

    LOCAL = "local"
    PREFILL = "prefill"
    """Prompt and one token; the blocks stay pinned until `SimCore.release_lease`."""
    DECODE = "decode"
    """The KV cache of the first `remote_tokens` comes from elsewhere: see `SimCore.handover_arrived`."""


def leg_of(leg: Leg, num_tokens: int) -> tuple[SimLeg, int]:
    """The core's kind of leg, and how many of an input's `num_tokens` have their KV cache elsewhere."""
    if isinstance(leg, PrefillLeg):
        return SimLeg.PREFILL, 0
    if isinstance(leg, DecodeLeg):
        return SimLeg.DECODE, num_tokens if leg.ticket is None else leg.ticket.num_tokens
    return SimLeg.LOCAL, 0


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One sequence to run.

    names: names of the full blocks of the input (prompt + resume), `wire.blocks.name_blocks`.
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
    """Name before the first block (`planes.wire.blocks.root`); only used with `tokens`."""
    key: int = 0
    """Picks the token stream (`tokens.key_of`); 0 is as good as any."""
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0
    script: tuple[int, ...] | None = None
    """Completion tokens, after which it ends; None: those of the token stream."""
    natural_tokens: int = 0
    """Mean completion tokens until the model ends by itself with `tokens.EOS`; 0: never."""


@dataclass(frozen=True, slots=True)
class SimReport:
    """What a sequence went through; seconds and words as in `frames.Usage`."""

    cached_tokens: int
    """Input tokens that were cached here when it was first scheduled."""
    queue_s: float
    """Decode leg: from the KV cache's arrival until scheduled, so that it and `handover_s` add up."""
    prefill_s: float
    decode_s: float
    handover_s: float
    handover_blocks: int
    """Decode leg: blocks that were moved."""
    num_preemptions: int


class SimOutput(msgspec.Struct, frozen=True, gc=False):
    """What one run of steps gave one sequence. A struct though it stays in the process: one is made for every token,
    and making a frozen dataclass takes ten times as long.

    num_tokens: new tokens, one per step of the run that ended (see `SimCore.step_ends`), the last one in its last
    step; always 1 without `horizon`.  tokens: their ids, empty when the request has none.  finish: set on the
    sequence's last output.  report: on its first output what is known by then, on its last everything.
    entropy: 64 bits behind the last token's draw, for made-up log probabilities.
    """

    request: RequestId
    num_tokens: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    report: SimReport | None = None
    entropy: int = 0


class KvMemory(Protocol):
    """Where the simulated KV bytes lie: one 64-bit word per block says what the block holds.

    A full block's word is its name; the word of a prompt's partial last block is the token chain's state at its end.
    """

    def write(self, blocks: Sequence[int], words: Hashes) -> None: ...

    def read(self, blocks: Sequence[int]) -> Hashes: ...
