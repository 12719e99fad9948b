"""How much a fleet bears, by a formula that is simple on purpose: it places loads, it decides nothing.

    prefill_s = mean over requests of  uncached * per_token + pairs * per_pair + fixed * (its part of a full step)
    decode_s  = (answer - 1) * step(batch, batch * context) / batch          batch = max_batch, or what the cache holds
    workers that do both:   workers / (prefill_s + decode_s)
    prefill and decode:     min(prefill workers / prefill_s, decode workers / decode_s)

A worker that takes `slow_worker` times as long counts 1 / slow_worker. `uncached` is what no request before had: as if
every shared block were cached where it is needed. Nothing is taken off for what steps of both kinds share, nor added
for handovers.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.report import quantile
from loadtest.simulator.scenario import Scenario
from loadtest.slo import Slo
from loadtest.workloads import Turn
from planes.wire.messages import EngineFacts, LatencyPrior

_MODERATE_BATCH = 16


@dataclass(frozen=True, slots=True)
class Capacity:
    """requests_per_s: what the fleet bears.  stay_s: how long a request stays there at that rate."""

    requests_per_s: float
    stay_s: float

    def clients(self, load: float, think_s: float = 0.0) -> int:
        """Clients of a closed loop that ask for a share `load` of it, by Little's law; at least one."""
        return max(1, round(load * self.requests_per_s * (self.stay_s + think_s)))


def capacity(turns: Sequence[Turn], scenario: Scenario) -> Capacity:
    """Of the scenario's fleet for these requests, which are in the order of their sending."""
    facts, speed = scenario.facts, scenario.facts.latency
    uncached_share = new_tokens(turns, facts.block_size) / sum(turn.prompt_tokens for turn in turns)
    prefill_s = statistics.fmean(_prefill_s(turn, uncached_share, facts) for turn in turns)
    answer = statistics.fmean(turn.completion_tokens for turn in turns)
    context = statistics.fmean(turn.prompt_tokens + turn.completion_tokens / 2 for turn in turns)
    batch = max(1, min(facts.max_batch, int(facts.num_blocks * facts.block_size // context)))
    step = step_s(speed, batch, batch * context)
    decode_s = (answer - 1) * step / batch
    slow = 1 - 1 / scenario.slow_worker
    first_s = alone_s(facts, max(facts.max_step_tokens, round(uncached_share * _mean_prompt(turns))))
    if scenario.num_both:
        per_s = (scenario.num_both - slow) / (prefill_s + decode_s)
        return Capacity(per_s, first_s + batch * (prefill_s + decode_s) * (answer > 1))
    per_s = (scenario.num_prefill - slow) / prefill_s
    if decode_s:
        per_s = min(per_s, scenario.num_decode / decode_s)
    return Capacity(per_s, first_s + (answer - 1) * step)


def new_tokens(turns: Sequence[Turn], block_size: int) -> int:
    """Prompt tokens that are in no block of a turn before."""
    seen: set[int] = set()
    tokens = 0
    for turn in turns:
        names = turn.blocks.tolist()
        tokens += turn.prompt_tokens
        tokens -= block_size * sum(name in seen for name in names[: turn.prompt_tokens // block_size])
        seen.update(names)
    return tokens


def _mean_prompt(turns: Sequence[Turn]) -> float:
    return statistics.fmean(turn.prompt_tokens for turn in turns)


def _prefill_s(turn: Turn, uncached_share: float, facts: EngineFacts) -> float:
    speed, uncached = facts.latency, uncached_share * turn.prompt_tokens
    part_of_step = max(uncached / facts.max_step_tokens, 1 / facts.max_batch)
    pairs = uncached * (turn.prompt_tokens - uncached / 2)
    return (
        speed.prefill_fixed_s * part_of_step + speed.prefill_per_token_s * uncached + speed.prefill_per_pair_s * pairs
    )


def alone_s(facts: EngineFacts, prompt_tokens: int) -> float:
    """Seconds in which an idle worker computes a prompt of which it holds nothing."""
    speed, steps = facts.latency, math.ceil(prompt_tokens / facts.max_step_tokens)
    per_token_s = speed.prefill_per_token_s + speed.prefill_per_pair_s * prompt_tokens / 2
    return steps * speed.prefill_fixed_s + prompt_tokens * per_token_s


def step_s(speed: LatencyPrior, batch: int, kv_tokens: float) -> float:
    """Seconds of a decode step."""
    return speed.step_fixed_s + speed.step_per_sequence_s * batch + speed.step_per_kv_token_s * kv_tokens


def slo(turns: Sequence[Turn], scenario: Scenario) -> Slo:
    """What a user of such a fleet may expect, from what it does while it is idle or moderately busy.

    First token: five times what the longest prompt of the shorter nine tenths takes alone, uncached, at least half a
    second: nobody notices less, and a rule must not be judged by prompts that no rule could serve in time. Mean time
    between tokens: three times that of a batch of 16, with the one handover that prefill and decode workers cannot do
    without; at least 25 ms, which is faster than people read.
    """
    facts, speed = scenario.facts, scenario.facts.latency
    prompt = int(quantile(sorted(turn.prompt_tokens for turn in turns), 0.9) or 0)
    answer = statistics.fmean(turn.completion_tokens for turn in turns)
    context = statistics.fmean(turn.prompt_tokens + turn.completion_tokens / 2 for turn in turns)
    gap_s = step_s(speed, _MODERATE_BATCH, _MODERATE_BATCH * context)
    if not scenario.num_both and answer > 1:
        gap_s += handover_s(facts, prompt) / (answer - 1)
    return Slo(ttft_s=max(0.5, 5 * alone_s(facts, prompt)), tpot_s=max(0.025, 3 * gap_s))


def handover_s(facts: EngineFacts, prompt_tokens: int) -> float:
    """Seconds in which a prompt's whole KV cache moves over an idle link."""
    num_bytes = math.ceil(prompt_tokens / facts.block_size) * facts.bytes_per_block
    return facts.latency.handover_fixed_s + num_bytes / facts.latency.handover_bytes_per_s
