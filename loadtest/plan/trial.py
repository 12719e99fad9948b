"""One fleet under the load: whether it holds the SLO, how far it misses, and what it is short of.

What is short is told by demand over supply of four resources while requests arrive:

    prefill      seconds that the prompts' uncached tokens take alone / prefill workers' seconds
    decode       seconds that the answers' tokens take in the largest batch within the SLO / decode workers' seconds
    KV memory    tokens held while answers were under way / what decode workers hold
    handover     bytes handed over / what the links of workers that prefill carry

Workers that do both prefill and decode in the same seconds: either share counts against all of them, and the two add
up. Preempted answers mean that memory ran out, whatever its mean was.

A sample is short: a fleet that falls behind by a fiftieth shows it after minutes only. So no fleet holds that is asked
for more seconds than it has (`load`).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from loadtest.grid.capacity import alone_s, step_s
from loadtest.like import LiveFleet
from loadtest.report import Slo, is_good, quantile
from loadtest.simulator.records import Ending, Record, Result
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.simulation import Simulation
from loadtest.workloads import Workload
from planes.wire.messages import EngineFacts

P99: Final = 0.99
WARM_UP: Final = 0.2
"""Share of the sample's time that fills caches and batches, and is not judged."""
_FEW_PREEMPTIONS: Final = 0.01  # of the requests


class Fleet(msgspec.Struct, frozen=True):
    """Workers of each role; those that do both, or those that prefill and decode."""

    num_prefill: int = 0
    num_decode: int = 0
    num_both: int = 0

    @property
    def workers(self) -> int:
        return self.num_prefill + self.num_decode + self.num_both

    def __str__(self) -> str:
        return f"{self.num_both} both" if self.num_both else f"{self.num_prefill} prefill + {self.num_decode} decode"


class Pressure(msgspec.Struct, frozen=True):
    """Demand over supply; 1 is all there is, and of memory no more than that can be held."""

    prefill: float
    decode: float
    kv_memory: float
    handover: float

    @property
    def most(self) -> float:
        """Of the bottleneck."""
        return max(self.prefill, self.decode, self.kv_memory, self.handover)

    @property
    def bottleneck(self) -> str:
        """The most wanted."""
        shares = {
            "prefill": self.prefill,
            "decode": self.decode,
            "KV memory": self.kv_memory,
            "handover link": self.handover,
        }
        return max(shares, key=shares.__getitem__)


class Trial(msgspec.Struct, frozen=True):
    """What a fleet made of the load. Seconds at p99 of the judged requests; unserved ones never had a first token."""

    fleet: Fleet
    num_requests: int
    num_unserved: int
    attainment: float
    """Share within both SLOs."""
    ttft_p99_s: float
    itl_p99_s: float
    """Of a request's mean time between tokens."""
    ttft_miss: float
    """p99 over the SLO: 1.2 is a fifth too long."""
    itl_miss: float
    pressure: Pressure

    @property
    def load(self) -> float:
        """Seconds wanted over seconds there are: of decode workers, and of all, which compute prompts too."""
        fleet, shares = self.fleet, self.pressure
        if fleet.num_both:
            return shares.prefill + shares.decode
        wanted = shares.prefill * fleet.num_prefill + shares.decode * fleet.num_decode
        return max(shares.decode, wanted / fleet.workers)

    @property
    def miss(self) -> float:
        return max(self.ttft_miss, self.itl_miss, self.load)

    @property
    def holds(self) -> bool:
        return self.miss <= 1.0


@dataclass(frozen=True, slots=True)
class Bench:
    """What all trials of a plan share."""

    workload: Workload
    facts: EngineFacts
    slo: Slo
    seed: int = 0
    policy: str = "headrace"
    like: LiveFleet | None = None

    def scenario(self, fleet: Fleet) -> Scenario:
        roles = (fleet.num_prefill, fleet.num_decode, fleet.num_both)
        slo = self.slo
        scenario = Scenario(
            self.policy, *roles, facts=self.facts, slo_ttft_s=slo.ttft_s, slo_itl_s=slo.tpot_s, seed=self.seed
        )
        return scenario if self.like is None else self.like.scenario(scenario)

    def trial(self, fleet: Fleet, on_progress: Callable[[int, int], None] = lambda _ended, _all: None) -> Trial:
        scenario = self.scenario(fleet)
        return judged(Simulation(scenario, self.workload, on_progress).run(), fleet, scenario, self.slo)


def judged(result: Result, fleet: Fleet, scenario: Scenario, slo: Slo) -> Trial:
    records = after_warm_up(result.records)
    ttfts = sorted(math.inf if record.ttft_s is None else record.ttft_s for record in records)
    itls = sorted(record.tpot_s for record in records if record.ending is Ending.FINISHED and record.tpot_s is not None)
    ttft_p99_s, itl_p99_s = quantile(ttfts, P99) or 0.0, quantile(itls, P99) or 0.0
    return Trial(
        fleet=fleet,
        num_requests=len(records),
        num_unserved=sum(record.ending is not Ending.FINISHED for record in records),
        attainment=statistics.fmean(is_good(record, slo) for record in records),
        ttft_p99_s=ttft_p99_s,
        itl_p99_s=itl_p99_s,
        ttft_miss=ttft_p99_s / slo.ttft_s,
        itl_miss=itl_p99_s / slo.tpot_s,
        pressure=pressure(records, fleet, scenario, slo),
    )


def after_warm_up(records: Sequence[Record]) -> list[Record]:
    """Those sent later than the first fifth of the time in which requests are sent."""
    first, last = min(record.sent_at for record in records), max(record.sent_at for record in records)
    return [record for record in records if record.sent_at >= first + WARM_UP * (last - first)]


def pressure(records: Sequence[Record], fleet: Fleet, scenario: Scenario, slo: Slo) -> Pressure:
    """See above."""
    named = scenario.workers()
    prefills = scenario.facts_of(named[0][0])
    decodes = scenario.facts_of(named[fleet.num_prefill][0])
    span_s = max(record.sent_at for record in records) - min(record.sent_at for record in records)
    if not span_s:
        return Pressure(0.0, 0.0, 0.0, 0.0)
    served = [record for record in records if record.last_at is not None and record.first_at is not None]
    decoding = fleet.num_decode + fleet.num_both
    kv_tokens = sum(
        (record.prompt_tokens + record.completion_tokens / 2) * ((record.last_at or 0.0) - (record.first_at or 0.0))
        for record in served
    )
    kv_memory = min(1.0, kv_tokens / (span_s * decoding * decodes.num_blocks * decodes.block_size))
    if sum(record.num_preemptions for record in served) > _FEW_PREEMPTIONS * len(records):
        kv_memory = 1.0
    sent_bytes = sum(record.handover_blocks for record in served) * prefills.bytes_per_block
    return Pressure(
        prefill=sum(_prefill_s(record, prefills) for record in records)
        / (span_s * (fleet.num_prefill + fleet.num_both)),
        decode=sum(_decode_s(record, decodes, slo) for record in records) / (span_s * decoding),
        kv_memory=kv_memory,
        handover=sent_bytes / prefills.latency.handover_bytes_per_s / (span_s * (fleet.num_prefill + fleet.num_both)),
    )


def _prefill_s(record: Record, facts: EngineFacts) -> float:
    """Of its uncached tokens, steps shared with others as far as they are not full."""
    speed, uncached = facts.latency, record.prompt_tokens - record.cached_tokens
    part_of_step = max(uncached / facts.max_step_tokens, 1 / facts.max_batch)
    pairs = uncached * (record.prompt_tokens - uncached / 2)
    per_token_s = speed.prefill_per_token_s * uncached + speed.prefill_per_pair_s * pairs
    return speed.prefill_fixed_s * part_of_step + per_token_s


def _decode_s(record: Record, facts: EngineFacts, slo: Slo) -> float:
    context = record.prompt_tokens + record.completion_tokens / 2
    batch = largest_batch(facts, context, slo)
    return (record.completion_tokens - 1) * step_s(facts.latency, batch, batch * context) / batch


def largest_batch(facts: EngineFacts, context: float, slo: Slo) -> int:
    """Sequences of this context that decode together within the SLO, and fit; at least one."""
    speed = facts.latency
    per_sequence_s = speed.step_per_sequence_s + speed.step_per_kv_token_s * context
    within = (slo.tpot_s - speed.step_fixed_s) / per_sequence_s if per_sequence_s else math.inf
    held = facts.num_blocks * facts.block_size / max(1.0, context)
    return max(1, int(min(facts.max_batch, within, held)))


@dataclass(frozen=True, slots=True)
class Need:
    """Workers that a formula says are needed, in fractions: where the search begins, nothing more.

    stay_s: how long a request stays, roughly.  alone_p99_s: what a prompt of p99's length takes on an idle worker.
    """

    prefill: float
    decode: float
    stay_s: float
    alone_p99_s: float


def need(bench: Bench, rate: float) -> Need:
    """From the mean request, as if nothing were cached twice."""
    turns = [turn for session in bench.workload.sessions for turn in session.turns]
    facts, slo = bench.facts, bench.slo
    records = [Record(0.0, turn.prompt_tokens, turn.completion_tokens) for turn in turns]
    prefill_s = statistics.fmean(_prefill_s(record, facts) for record in records)
    decode_s = statistics.fmean(_decode_s(record, facts, slo) for record in records)
    answer = statistics.fmean(turn.completion_tokens for turn in turns)
    longest = quantile(sorted(turn.prompt_tokens for turn in turns), P99) or 1
    return Need(
        prefill=rate * prefill_s,
        decode=rate * decode_s,
        stay_s=prefill_s + answer * min(slo.tpot_s, 2 * facts.latency.step_fixed_s),
        alone_p99_s=alone_s(facts, int(longest)),
    )
