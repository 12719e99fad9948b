"""What a model's load needs of its workers, and how busy a split of them would be.

**Need.** From the load of a window and the learnt speeds, with the formulas of `headrace plan` (`demand.py`):

    prefill   workers that the prompts' uncached tokens keep busy
    decode    workers that the answers' tokens keep busy, in the largest batch within the SLO

A worker that decodes at `itl` a token has time left for prompts. With n such workers, T tokens a second, f the fixed
time of a step and c what a sequence adds to it, streams that prompts stop for a share r of the time see

    itl = (f + c * T * itl / n) / (1 - r),   so   r = 1 - f / itl - c * T / n   at the SLO

Stalls come whole: an answer that has room for k full steps of prompts in its SLO keeps it while prompts get (1 - 1/k)
of that. So with m workers that only prefill, of the two

    pressure  = max(prefill / (m + n * r * (1 - 1/k)),  decode / n)          1: all there is
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from planes.wire.messages import EngineFacts, LatencyPrior
from router.demand import decode_s, prompts_s, sequence_s
from router.load import ModelLoad
from router.prices import MEASURED

_OTHER_LOAD: Final = 1.3
"""A load whose prompts, or answers, need so many times as much, or as little, as before is another one."""
_MODERATE_BATCH: Final = 16
"""A step's time with it stands for the usual one, where no SLO says what a token may take."""


@dataclass(frozen=True, slots=True)
class Need:
    """Of one model's load. prefill, decode: workers.  own_share: of a decoding worker's time that no prompt may have.
    tokens_share: c * T.  room: 1 - 1/k.
    """

    prefill: float
    decode: float
    own_share: float = 0.0
    tokens_share: float = 0.0
    room: float = 1.0

    def pressure(self, num_prefill: int, num_decode: int) -> float:
        """Demand over supply with so many workers that only prefill, and so many that take answers."""
        spare = max(0.0, num_decode * (1 - self.own_share) - self.tokens_share) * self.room
        return max(_share(self.prefill, num_prefill + spare), _share(self.decode, num_decode))

    def is_like(self, other: "Need") -> bool:
        """Whether neither part is much more or less than the other's."""
        pairs = ((self.prefill, other.prefill), (self.decode, other.decode))
        return all(max(one, two) <= _OTHER_LOAD * min(one, two) + 0.01 for one, two in pairs)


def need(load: ModelLoad, facts: EngineFacts, window_s: float) -> Need:
    """What arrived in the window, if it is like what ended there.  `load.ended` is 1 or more."""
    speed, arrived = facts.latency, load.arrived / load.ended
    prompts = load.arrived_tokens / load.prompt_tokens if load.prompt_tokens else arrived
    prefill = prompts * prompts_s(facts, load.ended, load.uncached_tokens, load.pairs) / window_s
    tokens_per_s = arrived * load.stream_tokens / window_s
    if not tokens_per_s or not load.streams:  # another version may tell the one without the other
        return Need(prefill, 0.0)
    context = load.stream_kv_tokens / load.stream_tokens
    per_sequence_s = sequence_s(speed, context)
    if load.with_itl and load.slo_itl_s:
        itl_s = load.slo_itl_s / load.with_itl
    else:
        itl_s = MEASURED.pause_steps * (speed.step_fixed_s + _MODERATE_BATCH * per_sequence_s)
    full_step_s = speed.prefill_fixed_s + facts.max_step_tokens * speed.prefill_per_token_s
    spare_s = max(0.0, itl_s - speed.step_fixed_s) * load.stream_tokens / load.streams
    return Need(
        prefill,
        decode_s(facts, tokens_per_s, context, itl_s),
        own_share=min(1.0, speed.step_fixed_s / itl_s),
        tokens_share=tokens_per_s * per_sequence_s,
        room=max(0.0, 1 - full_step_s / spare_s) if spare_s else 0.0,
    )


def typical(facts: Sequence[EngineFacts]) -> EngineFacts:
    """Of workers, as if all were alike: the mean of their speeds, and what the one with the least memory holds."""
    names = LatencyPrior.__struct_fields__
    mean = {name: sum(getattr(each.latency, name) for each in facts) / len(facts) for name in names}
    least = min(facts, key=lambda each: each.num_blocks * each.block_size)
    return msgspec.structs.replace(least, latency=LatencyPrior(**mean))


def _share(wanted: float, there: float) -> float:
    return wanted / there if there > 0 else math.inf if wanted > 0 else 0.0
