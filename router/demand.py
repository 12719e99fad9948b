"""Workers' seconds that requests take, by a formula: what `headrace plan` and `--autorole` compare fleets with.

    prompt   fixed * (its part of a full step) + per_token * uncached + per_pair * pairs
    answer   (tokens - 1) * step(batch, batch * context) / batch     batch: the largest within the SLO that fits

Nothing is taken off for what steps of both kinds share, nor added for handovers.
"""

import math

from planes.wire.messages import EngineFacts, LatencyPrior


def prefill_s(facts: EngineFacts, uncached_tokens: float, prompt_tokens: float) -> float:
    """Of a prompt's uncached tokens, steps shared with others as far as they are not full."""
    return prompts_s(facts, 1, uncached_tokens, uncached_tokens * (prompt_tokens - uncached_tokens / 2))


def prompts_s(facts: EngineFacts, count: float, uncached_tokens: float, pairs: float) -> float:
    """The same of `count` prompts together. pairs: sum over them of uncached * (prompt - uncached / 2) tokens."""
    speed = facts.latency
    steps = max(uncached_tokens / facts.max_step_tokens, count / facts.max_batch)
    return (
        steps * speed.prefill_fixed_s + speed.prefill_per_token_s * uncached_tokens + speed.prefill_per_pair_s * pairs
    )


def decode_s(facts: EngineFacts, tokens: float, context: float, itl_s: float) -> float:
    """Of `tokens` after the first ones, with so much context on average, in the largest batch."""
    batch = largest_batch(facts, context, itl_s)
    return tokens * step_s(facts.latency, batch, batch * context) / batch


def largest_batch(facts: EngineFacts, context: float, itl_s: float) -> int:
    """Sequences of this context that decode together within `itl_s` a step, and fit; at least one."""
    per_sequence_s = sequence_s(facts.latency, context)
    within = (itl_s - facts.latency.step_fixed_s) / per_sequence_s if per_sequence_s else math.inf
    held = facts.num_blocks * facts.block_size / max(1.0, context)
    return max(1, int(min(facts.max_batch, within, held)))


def step_s(speed: LatencyPrior, batch: float, kv_tokens: float) -> float:
    """Of a decode step."""
    return speed.step_fixed_s + speed.step_per_sequence_s * batch + speed.step_per_kv_token_s * kv_tokens


def sequence_s(speed: LatencyPrior, context: float) -> float:
    """What one more sequence of this context adds to a decode step."""
    return speed.step_per_sequence_s + speed.step_per_kv_token_s * context
