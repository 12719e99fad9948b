"""One fleet under the load: whether it holds the SLO, how far it misses, and what it is short of.

What is short is told by demand over supply of four resources while requests arrive:

    prefill      seconds that the prompts' uncached tokens take alone / prefill workers' seconds
    decode       seconds that the answers' tokens take in the largest batch within the SLO / decode workers' seconds
    KV memory    tokens held while answers were under way / what decode workers hold
    handover     bytes handed over / what the links of workers that prefill carry

Workers that do both prefill and decode in the same seconds: either share counts against all of them, and the two add
up. Preempted answers mean that memory ran out, whatever its mean was.

A run ends as soon as the SLO is surely missed by `SURELY` times: overloaded fleets take the longest to simulate, and
nobody asks for them. Where it does, p99 is what it is at least.

A sample is short: a fleet that falls behind by a fiftieth shows it after minutes only. So no fleet holds that is asked
for more seconds than it has (`load`).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from loadtest.grid.capacity import alone_s
from loadtest.like import LiveFleet
from loadtest.report import is_good, quantile
from loadtest.simulator.records import Ending, Record, Result
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.simulation import Simulation
from loadtest.slo import Slo
from loadtest.workloads import Workload
from planes.wire.messages import EngineFacts
from router.demand import decode_s, prefill_s, step_s

P99: Final = 0.99
WARM_UP: Final = 0.2
"""Share of the sample's time that fills caches and batches, and is not judged."""
SURELY: Final = 2.0
"""A fleet that takes so many times the SLO is not tried to the end."""
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
    is_cut: bool = False
    """It was not tried to the end: times and misses are at least so, attainment at most."""

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

    @property
    def distance(self) -> tuple[bool, float]:
        """From holding: what was cut is farther than what was not."""
        return self.is_cut, self.miss


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

    def trial(
        self,
        fleet: Fleet,
        on_progress: Callable[[int, int], None] = lambda _ended, _all: None,
        *,
        is_whole: bool = False,
    ) -> Trial:
        """is_whole: to the end, however far the SLO is missed."""
        scenario = self.scenario(fleet)
        watch = None if is_whole else Watch.over(self.workload, self.slo)
        simulation = Simulation(
            scenario, self.workload, on_progress, give_up=None if watch is None else watch.is_hopeless
        )
        result = simulation.run()
        if watch is not None and simulation.is_given_up:
            return watch.cut(result, fleet, scenario)
        return judged(result, fleet, scenario, self.slo)


@dataclass(frozen=True, slots=True)
class Watch:
    """Tells while a fleet is tried what its p99 will be at least.

    from_s: when the judged requests begin.  num_requests: how many there will be.  num_streams: with several tokens.
    """

    slo: Slo
    from_s: float
    num_requests: int
    num_streams: int

    @classmethod
    def over(cls, workload: Workload, slo: Slo) -> "Watch | None":
        """None where it is not known when requests are sent: a session's next turn waits for an answer."""
        sessions = workload.sessions
        if workload.num_clients is not None or any(len(session.turns) > 1 for session in sessions):
            return None
        first, last = sessions[0].start_s, sessions[-1].start_s
        from_s = first + WARM_UP * (last - first)
        judged = [session.turns[0] for session in sessions if session.start_s >= from_s]
        return cls(slo, from_s, len(judged), sum(turn.completion_tokens > 1 for turn in judged))

    def is_hopeless(self, records: Sequence[Record], now: float) -> bool:
        ttft_p99_s, itl_p99_s = self._at_least(self._judged(records), now)
        return max(ttft_p99_s / self.slo.ttft_s, itl_p99_s / self.slo.tpot_s) > SURELY

    def cut(self, result: Result, fleet: Fleet, scenario: Scenario) -> Trial:
        records, now, slo = self._judged(result.records), result.duration_s, self.slo
        ttft_p99_s, itl_p99_s = self._at_least(records, now)
        num_bad = sum(_ttft_so_far(each, now) > slo.ttft_s or _itl_so_far(each, now) > slo.tpot_s for each in records)
        return Trial(
            fleet=fleet,
            num_requests=self.num_requests,
            num_unserved=sum(record.ending not in {Ending.FINISHED, Ending.UNFINISHED} for record in records),
            attainment=1 - num_bad / self.num_requests,
            ttft_p99_s=ttft_p99_s,
            itl_p99_s=itl_p99_s,
            ttft_miss=ttft_p99_s / slo.ttft_s,
            itl_miss=itl_p99_s / slo.tpot_s,
            pressure=pressure(records, fleet, scenario, slo),
            is_cut=True,
        )

    def _judged(self, records: Sequence[Record]) -> list[Record]:
        return [record for record in records if record.sent_at >= self.from_s]

    def _at_least(self, records: Sequence[Record], now: float) -> tuple[float, float]:
        """p99 of the time to first token and between tokens, if all that is still to come took no time."""
        ttfts = [_ttft_so_far(record, now) for record in records]
        itls = [_itl_so_far(record, now) for record in records if record.completion_tokens > 1]
        return _p99_of(ttfts, self.num_requests), _p99_of(itls, self.num_streams)


def _ttft_so_far(record: Record, now: float) -> float:
    return (now if record.first_at is None else record.first_at) - record.sent_at


def _itl_so_far(record: Record, now: float) -> float:
    if record.first_at is None or record.completion_tokens < 2:
        return 0.0
    return ((now if record.last_at is None else record.last_at) - record.first_at) / (record.completion_tokens - 1)


def _p99_of(values: Sequence[float], count: int) -> float:
    """Of `count` values, of which those that are not there are 0."""
    place = count - max(1, math.ceil(P99 * count))  # from the largest
    return sorted(values, reverse=True)[place] if 0 <= place < len(values) else 0.0


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
    return prefill_s(facts, record.prompt_tokens - record.cached_tokens, record.prompt_tokens)


def _decode_s(record: Record, facts: EngineFacts, slo: Slo) -> float:
    context = record.prompt_tokens + record.completion_tokens / 2
    return decode_s(facts, record.completion_tokens - 1, context, slo.tpot_s)


@dataclass(frozen=True, slots=True)
class Need:
    """Workers that a formula says are needed, in fractions: where the search begins, nothing more.

    both: of workers that do both; a stream stands still while its worker computes prompts.
    stay_s: how long a request stays, roughly.  alone_p99_s: what a prompt of p99's length takes on an idle worker.
    """

    prefill: float
    decode: float
    both: float
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
    context = statistics.fmean(turn.prompt_tokens + turn.completion_tokens / 2 for turn in turns)
    longest = quantile(sorted(turn.prompt_tokens for turn in turns), P99) or 1
    return Need(
        prefill=rate * prefill_s,
        decode=rate * decode_s,
        both=_both(rate * prefill_s, rate * decode_s, rate * answer * slo.tpot_s, context, facts, slo),
        stay_s=prefill_s + answer * min(slo.tpot_s, 2 * facts.latency.step_fixed_s),
        alone_p99_s=alone_s(facts, int(longest)),
    )


def _both(prefill: float, decode: float, streams: float, context: float, facts: EngineFacts, slo: Slo) -> float:
    """Workers that leave streams the time for steps within the SLO: of n, a share `prefill` / n of the time goes to
    prompts, and streams / n decode together.
    """
    workers = prefill + decode
    for _ in range(3):  # fewer streams a worker, shorter steps
        batch = max(1, round(streams / max(1.0, workers)))
        left = 1 - step_s(facts.latency, batch, batch * context) / slo.tpot_s
        if left <= 0:
            break
        workers = max(prefill + decode, prefill / left)
    return workers
