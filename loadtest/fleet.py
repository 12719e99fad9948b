"""A fleet under a virtual clock: the gateway's own `Router` and the simulated engine's own `SimCore`, nothing else.

    session starts → router.submit, dispatch → [hop] → prefill steps → [hop] first token, decode leg → [hop]
      → blocks admitted → [sender's NIC, one transfer at a time, then the link's fixed time] → decode steps → [hop]
      → router.release → think time → next turn

What the model adds to those two is the wiring of the live system: a hop each way between gateway and worker, KV
events and load reports that arrive late, and one transfer at a time per sending worker (a NIC is shared fairly in
truth; the last byte of a batch of transfers arrives at the same instant either way). The first token of a handed over
request is the prefill worker's and goes to the client at once; the decode worker goes on from the second. Everything
is a function of the scenario and the workload: equal seeds give equal results.
"""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

import numpy as np

from loadtest.workloads import Session, Turn, Workload
from planes.wire.errors import Rejected
from planes.wire.messages import (
    EngineFacts,
    HandoverEndpoint,
    HandoverMode,
    KvEvent,
    KvEvents,
    LatencyPrior,
    LoadReport,
    Registration,
    RequestId,
    Role,
    Snapshot,
    WorkerId,
    WorkerState,
)
from router.policies import load_policy
from router.request import Observed, Outcome, RoutableRequest, Route
from router.router import Refusal, Router
from router.settings import RouterSettings
from workers.kv_events import CachedBlocks
from workers.sim.core import SimCore, SimLeg, SimOutput, SimReport, SimRequest

MODEL: Final = "simulated"
_EPOCH: Final = 1
_BUSY_REPORT_S: Final = 0.1
_IDLE_REPORT_S: Final = 1.0
_LEAST_SLEEP_S: Final = 0.001
_HORIZON_S: Final = 0.5
"""Longest run of steps computed as one: load reports get their samples at its end."""


def engine_facts(*, block_size: int, num_blocks: int, link_gbps: float) -> EngineFacts:
    """A worker of the simulated fleet: an 8B model (128 KiB of KV cache per token) that prefills 8000 tokens/s."""
    return EngineFacts(
        block_size=block_size,
        num_blocks=num_blocks,
        context_length=min(200_000, num_blocks * block_size - 1),
        max_batch=128,
        max_step_tokens=2048,
        bytes_per_block=block_size * 128 * 1024,
        vocab_size=256,
        latency=LatencyPrior(handover_bytes_per_s=link_gbps * 1e9 / 8),
    )


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fleet and its router."""

    policy: str
    num_prefill: int
    num_decode: int
    num_both: int
    facts: EngineFacts
    seed: int = 0
    num_gateways: int = 1
    slow_worker: float = 1.0
    """The first worker takes this many times as long for everything; nobody tells the router."""
    hop_s: float = 0.0005
    """Gateway to worker or back."""
    publish_s: float = 0.002
    """KV events and load reports under way."""
    drain_s: float = 3600.0
    """The run ends this long after the last session's start; what is not finished by then counts as unfinished."""


class Ending(StrEnum):
    """How a request ended; every request has exactly one."""

    FINISHED = "finished"
    REJECTED = "rejected"
    UNFINISHED = "unfinished"


@dataclass(slots=True)
class Record:
    """What became of one request, as its client saw it. Instants count from the start of the run."""

    sent_at: float
    prompt_tokens: int
    completion_tokens: int
    ending: Ending | None = None
    held_s: float = 0.0
    predicted_ttft_s: float | None = None
    cached_tokens: int = 0
    first_at: float | None = None
    last_at: float | None = None
    handover_blocks: int = 0
    is_handed_over: bool = False
    num_preemptions: int = 0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.sent_at

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between its tokens; None with fewer than two."""
        if self.first_at is None or self.last_at is None or self.completion_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.completion_tokens - 1)


class Gaps:
    """Seconds between tokens, of all requests together: a histogram with bins 1 % wide."""

    _LEAST_S, _STEP = 1e-6, math.log(1.01)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, gap_s: float, times: int = 1) -> None:
        self._counts[int(math.log(max(gap_s, self._LEAST_S) / self._LEAST_S) / self._STEP)] += times

    def add_between(self, instants: Sequence[float], times: int) -> None:
        """The gaps between neighbours, each `times` times."""
        if len(instants) < 8:  # not worth an array
            for sooner, later in itertools.pairwise(instants):
                self.add(later - sooner, times)
            return
        gaps = np.maximum(np.diff(instants), self._LEAST_S)
        bins, counts = np.unique((np.log(gaps / self._LEAST_S) / self._STEP).astype(np.int64), return_counts=True)
        for bin_, count in zip(bins.tolist(), counts.tolist(), strict=True):
            self._counts[bin_] += count * times

    def quantile(self, q: float) -> float | None:
        """Upper edge of the bin in which the quantile lies; None if there are no gaps."""
        wanted, seen = q * self._counts.total(), 0
        for bin_, count in sorted(self._counts.items()):
            seen += count
            if seen >= wanted:
                return self._LEAST_S * math.exp((bin_ + 1) * self._STEP)
        return None


@dataclass(slots=True)
class WorkerTotals:
    """What one worker did in a run."""

    worker: WorkerId
    role: Role
    busy_s: float = 0.0
    prompts: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """Everything a run gave; `report.summarise` makes a row of it."""

    records: list[Record]
    gaps: Gaps
    workers: list[WorkerTotals]
    duration_s: float
    num_dispatches: int


class Clock:
    """Virtual time: calls happen in order of their instant, and of their making where instants are equal."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def at(self, instant: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._calls, (max(instant, self.now), next(self._order), call, args))

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now + seconds, call, *args)

    def run(self, *, until: float, is_over: Callable[[], bool]) -> None:
        while self._calls and not is_over() and self._calls[0][0] <= until:
            self.now, _, call, args = heapq.heappop(self._calls)
            call(*args)


@dataclass(slots=True)
class Flow:
    """One request under way."""

    request: RequestId
    turn: Turn
    record: Record
    on_end: Callable[[], None]
    route: Route | None = None
    bound_at: float = 0.0
    reports: list[SimReport] = field(default_factory=list)
    """One a leg, in order."""
    token_at: float | None = None
    """Instant of the last token, at the worker that made it."""
    num_tokens: int = 0

    @property
    def bound(self) -> Route:
        if self.route is None:
            raise RuntimeError(f"request {self.request} reached a worker before it was bound")
        return self.route


class Worker:
    """A `SimCore` with what surrounds it in a worker process: events out, reports out, KV caches in and out."""

    def __init__(self, number: int, role: Role, scenario: Scenario, clock: Clock, gaps: Gaps) -> None:
        self.id = WorkerId(f"{role}-{number:03}")
        self.totals = WorkerTotals(self.id, role)
        self.gateways: list[Gateway] = []
        self.peers: dict[WorkerId, Worker] = {}
        self._clock, self._scenario, self._gaps = clock, scenario, gaps
        self._events: list[KvEvent] = []
        self._held = CachedBlocks()
        self._seq = 0
        self._flows: dict[RequestId, Flow] = {}
        self._nic_free_at = 0.0
        self._wake_at: float | None = None
        self._begun_at = 0.0
        self._report_at = math.inf
        self.core = SimCore(scenario.facts, scenario.facts.latency, model=MODEL, on_events=self._events.extend)

    @property
    def registration(self) -> Registration:
        endpoint = HandoverEndpoint(HandoverMode.PULL, self.id, "127.0.0.1", 1)
        return Registration(
            worker=self.id,
            epoch=_EPOCH,
            role=self.totals.role,
            model=MODEL,
            address="127.0.0.1:1",
            engine="sim",
            facts=self._scenario.facts,
            card_digest="",
            handover=endpoint,
        )

    # --- requests ------------------------------------------------------------------------------------------------

    def run(self, flow: Flow, leg: SimLeg) -> None:
        """A Generate frame arrived."""
        turn, is_decode = flow.turn, leg is SimLeg.DECODE
        self._flows[flow.request] = flow
        request = SimRequest(
            request=flow.request,
            prompt_tokens=turn.prompt_tokens,
            names=turn.blocks[: (turn.prompt_tokens + is_decode) // self._scenario.facts.block_size],
            max_tokens=1 if leg is SimLeg.PREFILL else turn.completion_tokens,
            resume_tokens=1 if is_decode else 0,
            leg=leg,
            remote_tokens=turn.prompt_tokens if is_decode else 0,
        )
        if not is_decode:
            self.totals.prompts += 1
        self.core.submit(request, now=self._clock.now)
        self._advance()
        if self._report_at > self._clock.now + _BUSY_REPORT_S:
            self._report_in(_BUSY_REPORT_S)

    def _advance(self) -> None:
        """Go on computing if there is anything, and publish what changed. Call after every call of the core."""
        now, core = self._clock.now, self.core
        self._start_handovers()
        while core.busy_until is None:
            self._begun_at = now
            if core.begin_step(now=now, horizon=now + _HORIZON_S) is None and not self._start_handovers():
                break
        self._start_handovers()
        if core.busy_until != self._wake_at:
            self._wake_at = core.busy_until
            if self._wake_at is not None:
                self._clock.at(self._wake_at, self._step_ended, self._wake_at)
        if self._events:
            self._publish()

    def _step_ended(self, planned: float) -> None:
        if planned != self._wake_at:
            return  # the run was cut short, or stretched, since
        self._wake_at = None
        self.totals.busy_s += self._clock.now - self._begun_at
        outputs = self.core.end_step(now=self._clock.now)
        ends = self.core.step_ends
        if len(ends) > 1:
            self._gaps.add_between(ends, sum(output.num_tokens == len(ends) for output in outputs))
        for output in outputs:
            self._token(output, ends)
        self._advance()

    def _token(self, output: SimOutput, ends: list[float]) -> None:
        flow = self._flows[output.request]
        instants = ends[-output.num_tokens :]
        if flow.token_at is not None:
            self._gaps.add(instants[0] - flow.token_at)
        if len(instants) < len(ends):  # otherwise counted with all others of the run
            self._gaps.add_between(instants, 1)
        is_first = flow.num_tokens == 0
        flow.num_tokens += output.num_tokens
        flow.token_at = instants[-1]
        if output.finish is not None:
            if output.report is not None:
                flow.reports.append(output.report)
            del self._flows[flow.request]
        if is_first or output.finish is not None:
            gateway = self.gateways[0].of(flow)
            self._clock.after(self._scenario.hop_s, gateway.heard, flow, instants[0], output.finish is not None)

    # --- handovers -----------------------------------------------------------------------------------------------

    def _start_handovers(self) -> bool:
        """Fetch what admitted decode legs lack. Returns whether one lacks nothing and may run already."""
        has_ready = False
        for request in self.core.take_admitted():
            flow = self._flows[request]
            blocks = self.core.missing_blocks(request)
            sender = self.peers[flow.bound.prefill or self.id]
            if blocks:
                self._clock.at(sender.send(blocks), self._handover_arrived, request, sender)
            else:
                has_ready = True
                self._clock.at(self._clock.now, sender.release, request)
                self.core.handover_arrived(request, now=self._clock.now)
        return has_ready

    def send(self, num_blocks: int) -> float:
        """Put a transfer in the line of this worker's NIC; the instant at which it arrives."""
        facts = self._scenario.facts
        num_bytes = num_blocks * facts.bytes_per_block
        self.totals.sent_bytes += num_bytes
        start = max(self._clock.now, self._nic_free_at)
        self._nic_free_at = start + num_bytes / facts.latency.handover_bytes_per_s
        return self._nic_free_at + facts.latency.handover_fixed_s

    def _handover_arrived(self, request: RequestId, sender: "Worker") -> None:
        sender.release(request)
        self.core.handover_arrived(request, now=self._clock.now)
        self._advance()

    def release(self, request: RequestId) -> None:
        """A decode worker has read what this one kept for it."""
        self.core.release_lease(request, now=self._clock.now)
        self._advance()

    # --- the event plane -----------------------------------------------------------------------------------------

    def _publish(self) -> None:
        events = self._events[:]
        self._events.clear()
        for event in events:
            self._held.apply(event)
        self._seq += 1
        batch = KvEvents(self.id, _EPOCH, self._seq, events)
        for gateway in self.gateways:
            self._clock.after(self._scenario.publish_s, gateway.apply_events, batch)

    def _report_in(self, seconds: float) -> None:
        self._report_at = self._clock.now + seconds
        self._clock.at(self._report_at, self.report, self._report_at)

    def report(self, planned: float) -> None:
        """Publish a load report and plan the next, unless another was planned since."""
        if planned != self._report_at:
            return
        load = self.core.load(now=self._clock.now)
        report = LoadReport(
            worker=self.id,
            epoch=_EPOCH,
            state=WorkerState.READY,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            waiting_prefill_tokens=load.waiting_prefill_tokens,
            free_blocks=load.free_blocks,
            kv_tokens=load.kv_tokens,
            seq=self._seq,
            num_cached=len(self._held),
            digest=self._held.digest,
            steps=self.core.take_samples(),
        )
        for gateway in self.gateways:
            self._clock.after(self._scenario.publish_s, gateway.apply_load, report)
        is_busy = load.num_running + load.num_waiting > 0
        self._report_in(_BUSY_REPORT_S if is_busy else _IDLE_REPORT_S)

    def start(self, at: float) -> None:
        self._report_at = at
        self._clock.at(at, self.report, at)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.id, _EPOCH, self._seq, self._held.packed())


class Gateway:
    """A `Router` and what the gateway's relay does for a request, without its bytes."""

    def __init__(self, router: Router, scenario: Scenario, clock: Clock, flows: "dict[RequestId, Gateway]") -> None:
        self.router = router
        self.workers: dict[WorkerId, Worker] = {}
        self.num_dispatches = 0
        self._scenario, self._clock, self._owners = scenario, clock, flows
        self._flows: dict[RequestId, Flow] = {}
        self._snapshots: set[WorkerId] = set()
        self._wakeup: float | None = None

    def of(self, flow: Flow) -> "Gateway":
        """The gateway that a request came through."""
        return self._owners[flow.request]

    def submit(self, flow: Flow) -> None:
        turn, now = flow.turn, self._clock.now
        self._flows[flow.request] = flow
        self._owners[flow.request] = self
        request = RoutableRequest(
            request=flow.request,
            model=MODEL,
            blocks=turn.blocks[: turn.prompt_tokens // self._scenario.facts.block_size],
            prompt_tokens=turn.prompt_tokens,
            expected_tokens=turn.completion_tokens,
            deadline=now + 86_400.0,
        )
        try:
            self.router.submit(request, now=now)
        except Rejected:
            self._end(flow, Ending.REJECTED)
        self._pump()

    def _pump(self) -> None:
        """Bind what can be bound now, and come back when the router wants to."""
        self.num_dispatches += 1
        for answer in self.router.dispatch(now=self._clock.now):
            flow = self._flows[answer.request]
            if isinstance(answer, Refusal):
                self._end(flow, Ending.REJECTED)
            else:
                self._bind(flow, answer)
        wakeup = self.router.wakeup()
        if wakeup is None:
            return
        wakeup = max(wakeup, self._clock.now + _LEAST_SLEEP_S)
        if self._wakeup is None or wakeup < self._wakeup:
            self._wakeup = wakeup
            self._clock.at(wakeup, self._woken, wakeup)

    def _woken(self, planned: float) -> None:
        if planned == self._wakeup:
            self._wakeup = None
            self._pump()

    def _bind(self, flow: Flow, route: Route) -> None:
        flow.route, flow.bound_at = route, self._clock.now
        flow.record.held_s = route.held_s
        flow.record.predicted_ttft_s = route.held_s + route.predicted.ttft_s
        is_alone = route.prefill is None or flow.turn.completion_tokens == 1  # nothing to hand over after one token
        leg = SimLeg.LOCAL if is_alone else SimLeg.PREFILL
        worker = self.workers[route.prefill or route.decode]
        self._clock.after(self._scenario.hop_s, worker.run, flow, leg)

    def heard(self, flow: Flow, first_at: float, is_finish: bool) -> None:
        """A worker answered: with a request's first token, with its last, or with both."""
        record, now, route = flow.record, self._clock.now, flow.bound
        if record.first_at is None:
            record.first_at = first_at + self._scenario.hop_s
            self.router.prefilled(flow.request, now=now)
        if is_finish and flow.num_tokens >= flow.turn.completion_tokens:
            record.last_at = now
            self.router.release(flow.request, self._observed(flow), now=now)
            self._end(flow, Ending.FINISHED)
        elif is_finish and route.prefill is not None:
            record.is_handed_over = True
            self._clock.after(self._scenario.hop_s, self.workers[route.decode].run, flow, SimLeg.DECODE)
        self._pump()

    def _observed(self, flow: Flow) -> Observed:
        record, reports = flow.record, flow.reports
        computed = reports[0]
        record.cached_tokens = computed.cached_tokens
        record.num_preemptions = sum(report.num_preemptions for report in reports)
        observed = Observed(
            ttft_s=None if record.first_at is None else record.first_at - flow.bound_at,
            queue_s=computed.queue_s,
            prefill_s=computed.prefill_s,
            cached_tokens=computed.cached_tokens,
            completion_tokens=flow.num_tokens,
            outcome=Outcome.FINISHED,
        )
        if not record.is_handed_over:
            return observed
        decode = reports[1]
        record.handover_blocks = decode.handover_blocks
        num_bytes = decode.handover_blocks * self._scenario.facts.bytes_per_block
        return replace(observed, handover_s=decode.handover_s, handover_bytes=num_bytes)

    def _end(self, flow: Flow, ending: Ending) -> None:
        if flow.record.ending is not None:
            raise RuntimeError(f"request {flow.request} ended twice: {flow.record.ending}, then {ending}")
        flow.record.ending = ending
        del self._flows[flow.request], self._owners[flow.request]
        flow.on_end()

    # --- the event plane -----------------------------------------------------------------------------------------

    def apply_events(self, batch: KvEvents) -> None:
        self.router.apply_events(batch)

    def apply_load(self, report: LoadReport) -> None:
        self.router.apply_load(report, now=self._clock.now)
        for worker in self.router.workers_to_snapshot():
            if worker not in self._snapshots:
                self._snapshots.add(worker)
                self._clock.after(self._scenario.publish_s, self._ask, worker)
        self._pump()

    def _ask(self, worker: WorkerId) -> None:
        self._clock.after(self._scenario.publish_s, self._apply_snapshot, self.workers[worker].snapshot())

    def _apply_snapshot(self, snapshot: Snapshot) -> None:
        self._snapshots.discard(snapshot.worker)
        self.router.apply_snapshot(snapshot)


def default_router(scenario: Scenario, number: int) -> Router:
    """A gateway's router; its queue has no limit, so that all policies serve the same requests."""
    settings = RouterSettings(queue_limit=10**6, history=1)
    return Router(settings, load_policy(scenario.policy), rng=random.Random(f"{scenario.seed}/{number}"))


@dataclass(slots=True)
class Run:
    """One workload served by one fleet."""

    scenario: Scenario
    workload: Workload
    on_progress: Callable[[int, int], None] = lambda _ended, _all: None
    make_router: Callable[[Scenario, int], Router] = default_router
    """Scenario and number of the gateway → its router."""
    clock: Clock = field(default_factory=Clock)
    gaps: Gaps = field(default_factory=Gaps)
    records: list[Record] = field(default_factory=list)
    num_ended: int = 0
    num_requests: int = 0

    def simulate(self) -> Result:
        """Serve it all, or as much as ends within `drain_s`."""
        workers, gateways = self._build()
        for number, session in enumerate(self.workload.sessions):
            gateway = gateways[number % len(gateways)]
            self.clock.at(session.start_s, self._send, gateway, session, 0)
        total = self.num_requests = self.workload.num_requests
        last = max((session.start_s for session in self.workload.sessions), default=0.0)
        self.clock.run(until=last + self.scenario.drain_s, is_over=lambda: self.num_ended == total)
        for record in self.records:
            record.ending = record.ending or Ending.UNFINISHED
        dispatches = sum(gateway.num_dispatches for gateway in gateways)
        return Result(self.records, self.gaps, [worker.totals for worker in workers], self.clock.now, dispatches)

    def _build(self) -> tuple[list[Worker], list[Gateway]]:
        scenario = self.scenario
        roles = [Role.PREFILL] * scenario.num_prefill + [Role.DECODE] * scenario.num_decode
        roles += [Role.BOTH] * scenario.num_both
        workers = [Worker(number, role, scenario, self.clock, self.gaps) for number, role in enumerate(roles)]
        workers[0].core.set_slowdown(scenario.slow_worker, now=0.0)
        owners: dict[RequestId, Gateway] = {}
        numbers = range(scenario.num_gateways)
        gateways = [Gateway(self.make_router(scenario, n), scenario, self.clock, owners) for n in numbers]
        by_id = {worker.id: worker for worker in workers}
        rng = random.Random(scenario.seed)
        for gateway in gateways:
            gateway.workers = by_id
            for worker in workers:
                gateway.router.worker_up(worker.registration)
        for worker in workers:
            worker.gateways, worker.peers = gateways, by_id
            worker.start(rng.random() * _BUSY_REPORT_S)
        return workers, gateways

    def _send(self, gateway: Gateway, session: Session, number: int) -> None:
        turn = session.turns[number]
        record = Record(self.clock.now, turn.prompt_tokens, turn.completion_tokens)
        request = RequestId(f"r{len(self.records)}")
        self.records.append(record)

        def ended() -> None:
            self.num_ended += 1
            self.on_progress(self.num_ended, self.num_requests)
            if number + 1 < len(session.turns) and record.ending is Ending.FINISHED:
                self.clock.after(session.turns[number + 1].think_s, self._send, gateway, session, number + 1)
            elif number + 1 < len(session.turns):
                self.num_ended += len(session.turns) - number - 1  # nobody asks on without an answer

        gateway.submit(Flow(request, turn, record, ended))
