"""What a simulated engine is told to be."""

from dataclasses import dataclass

from planes.wire.messages import EngineFacts, HandoverMode, LatencyPrior, WorkerId
from workers.engine.base import EngineStartError


@dataclass(frozen=True, slots=True, kw_only=True)
class SimOptions:
    """What a simulated engine is. Seconds are simulated ones: they pass `speedup` times faster."""

    worker: WorkerId
    model: str
    facts: EngineFacts
    """`latency` is what the engine says of itself; with `speed` left out it is the truth."""
    speed: LatencyPrior | None = None
    speedup: float = 1.0
    handover: HandoverMode | None = HandoverMode.PULL
    host: str = "127.0.0.1"
    """Where other engines reach the handover endpoint."""
    bind_host: str = ""
    """Where it listens; empty: `host`."""
    seed: int = 0
    """Picks the tokens; engines of one model that continue each other's streams need the same."""
    answer_tokens: int = 0
    """Completion tokens after which an answer ends by itself, on average; 0: never."""
    lease_s: float = 30.0
    """Real seconds that a prefilled KV cache waits to be fetched."""
    handover_timeout_s: float = 30.0
    """Real seconds that a decode leg waits for its KV cache."""


def faster(speed: LatencyPrior, speedup: float) -> LatencyPrior:
    """The same engine on a clock that runs `speedup` times faster."""
    if not speedup > 0:
        raise EngineStartError(f"speedup is {speedup}; it must be more than 0")
    return LatencyPrior(
        prefill_fixed_s=speed.prefill_fixed_s / speedup,
        prefill_per_token_s=speed.prefill_per_token_s / speedup,
        prefill_per_pair_s=speed.prefill_per_pair_s / speedup,
        step_fixed_s=speed.step_fixed_s / speedup,
        step_per_sequence_s=speed.step_per_sequence_s / speedup,
        step_per_kv_token_s=speed.step_per_kv_token_s / speedup,
        handover_fixed_s=speed.handover_fixed_s / speedup,
        handover_bytes_per_s=speed.handover_bytes_per_s * speedup,
    )
