"""One life of a simulated worker: `SimCore` with what surrounds it in a worker process.

Legs and KV caches in and out. A life ends when it is killed; the next one is another object.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, MutableMapping, Sequence
from typing import Final

from app.serving.errors import leg_error
from app.serving.events import Event, LegDone, LegFailed, LegOutput
from loadtest.simulator.clock import Clock
from loadtest.simulator.leases import Leases
from loadtest.simulator.leg import SimulatedLeg
from loadtest.simulator.publisher import Listener, SimulatedPublisher
from loadtest.simulator.records import Gaps, WorkerTotals
from loadtest.simulator.scenario import MODEL, Scenario
from planes.wire.errors import ROLE_CHANGED
from planes.wire.frames import DecodeLeg, Done, Failed, FailureKind, FinishReason, PrefillLeg, StreamId, Ticket, Usage
from planes.wire.messages import HandoverEndpoint, HandoverMode, Registration, RequestId, Role, WorkerId
from workers.sim.core import SimCore, SimOutput, SimReport
from workers.validate import is_for

_HORIZON_S: Final = 0.5
"""Longest run of steps computed as one: load reports get their samples at its end."""
_NEWS_S: Final = 1.0
"""As in `workers/role.py`."""
_LOOK_AGAIN_S: Final = 0.1
_PAYLOAD: Final = b"."
_STREAM: Final = StreamId(0)


class SimulatedWorker:
    """See above. Nothing happens after `kill`, whoever calls.

    lives: of all workers, the present ones.  rng: decides which legs are refused.
    """

    def __init__(
        self,
        totals: WorkerTotals,
        epoch: int,
        scenario: Scenario,
        clock: Clock,
        gaps: Gaps,
        *,
        lives: "MutableMapping[WorkerId, SimulatedWorker]",
        listeners: Sequence[Listener],
        rng: random.Random,
    ) -> None:
        self.id = totals.worker
        self.epoch = epoch
        self.totals = totals
        self.killed_at: float | None = None
        self.role = totals.role
        self.becoming: Role | None = None
        self._takes: Role | None = totals.role
        self._scenario, self._clock, self._gaps, self._rng = scenario, clock, gaps, rng
        self._facts = scenario.facts_of(self.id)
        self._lives = lives
        self._legs: dict[RequestId, SimulatedLeg] = {}
        self._nic_free_at = 0.0
        self._wake_at: float | None = None
        self._begun_at = 0.0
        self.publisher = SimulatedPublisher(self.id, epoch, clock, scenario.publish_s, listeners)
        self.core = SimCore(self._facts, self._facts.latency, model=MODEL, on_events=self.publisher.kv_changed)
        self._leases = Leases(clock, scenario.lease_s, free=self._free, on_expired=self._lease_expired)

    @property
    def is_alive(self) -> bool:
        return self.killed_at is None

    @property
    def registration(self) -> Registration:
        endpoint = HandoverEndpoint(HandoverMode.PULL, self.id, "127.0.0.1", 1)
        return Registration(
            worker=self.id,
            epoch=self.epoch,
            role=self.role,
            model=MODEL,
            address="127.0.0.1:1",
            engine="sim",
            facts=self._facts,
            card_digest="",
            handover=endpoint,
            roles=tuple(Role),
            becoming=self.becoming,
        )

    def kill(self) -> None:
        """The process is gone. What it had sent by now still arrives."""
        now, core = self._clock.now, self.core
        self.killed_at = now
        self.totals.num_kills += 1
        self.publisher.stop()
        if core.busy_until is not None:
            self.totals.busy_s += now - self._begun_at
            outputs, ends = core.end_step(now=now), core.step_ends
            self._deliver(outputs, ends, num_ended=bisect_right(ends, now))
        for leg in self._legs.values():
            if tokens := leg.untold():
                self._clock.call_later(self._scenario.hop_s, leg.connection.note, leg, tokens)
        self._legs.clear()

    # --- its role --------------------------------------------------------------------------------------------------

    def change_role(self, role: Role, migrate_after_s: float, tell: Callable[[], None]) -> None:
        """As `workers/role.py` does. tell: calls for the gateways to look again."""
        if role in {Role.BOTH, self.role}:
            self.role, self.becoming, self._takes = role, None, role
        else:
            self.becoming = role
            self._clock.call_later(_NEWS_S, self._drain, role, self._clock.now + _NEWS_S + migrate_after_s, tell)
        tell()

    def _drain(self, role: Role, moves_at: float, tell: Callable[[], None]) -> None:
        if self.becoming is not role or not self.is_alive:
            return
        self._takes = self.registration.takes
        beyond = [leg for leg in self._legs.values() if not is_for(role, leg.kind)]
        if beyond and self._clock.now < moves_at:
            self._clock.call_later(_LOOK_AGAIN_S, self._drain, role, moves_at, tell)
            return
        for leg in beyond:
            self._forget(leg)
            if tokens := leg.untold():
                self._clock.call_later(self._scenario.hop_s, leg.connection.note, leg, tokens)
            self._fail(leg, FailureKind.INTERRUPTED, ROLE_CHANGED, f"its role becomes {role}")
        self._advance()
        self.role, self.becoming, self._takes = role, None, role
        tell()

    # --- legs ----------------------------------------------------------------------------------------------------

    def start(self, leg: SimulatedLeg) -> None:
        """A Generate frame arrived."""
        if not self.is_alive:
            return
        share = self._scenario.faults.busy_share
        if share and self._rng.random() < share:
            self.totals.num_refused += 1
            self._fail(leg, FailureKind.REJECTED, "worker_busy", f"it refuses {share:.1%} of all legs")
            return
        if self._takes is None or not is_for(self._takes, leg.kind):
            self._fail(leg, FailureKind.REJECTED, ROLE_CHANGED, f"it is {self.role} now")
            return
        if leg.num_resumed >= leg.max_tokens:  # only the end was lost
            self._done(leg, None, FinishReason.LENGTH)
            return
        self._legs[leg.name] = leg
        if not isinstance(leg.kind, DecodeLeg):
            self.totals.prompts += 1
        self.core.submit(leg.sim_request(self._facts.block_size), now=self._clock.now)
        self._advance()
        self.publisher.wake()

    def cancel(self, leg: SimulatedLeg) -> None:
        """A Cancel frame arrived."""
        if self.is_alive and self._legs.get(leg.name) is leg:
            self._forget(leg)
            self._advance()

    def release(self, name: RequestId) -> None:
        """A Release frame arrived, or the KV cache has been taken."""
        if self.is_alive:
            self._leases.end(name)

    def _forget(self, leg: SimulatedLeg) -> None:
        """Whoever gives up what it was to take says so itself."""
        del self._legs[leg.name]
        self.core.abort(leg.name, now=self._clock.now)
        if isinstance(leg.kind, DecodeLeg) and leg.kind.ticket is not None:
            self._clock.call_soon(self._lives[leg.kind.ticket.worker].release, leg.name)

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
                self._clock.call_at(self._wake_at, self._step_ended, self._wake_at)
        self.publisher.seal()

    def _step_ended(self, planned: float) -> None:
        if planned != self._wake_at or not self.is_alive:
            return  # the run was cut short, or stretched, since
        self._wake_at = None
        self.totals.busy_s += self._clock.now - self._begun_at
        outputs, ends = self.core.end_step(now=self._clock.now), self.core.step_ends
        self._deliver(outputs, ends, num_ended=len(ends))
        self._advance()

    # --- answers -------------------------------------------------------------------------------------------------

    def _deliver(self, outputs: Sequence[SimOutput], ends: Sequence[float], *, num_ended: int) -> None:
        """Hand out what a run of steps gave; of those only the first `num_ended` were computed to their end."""
        if not num_ended:
            return
        is_cut = num_ended < len(ends)
        if num_ended > 1:
            self._gaps.add_between(ends[:num_ended], sum(output.num_tokens == len(ends) for output in outputs))
        for output in outputs:
            instants = ends[len(ends) - output.num_tokens : num_ended]
            if not instants:
                continue
            leg = self._legs[output.request]
            if isinstance(leg.kind, PrefillLeg):
                self._prefilled(leg, leg.kind, output, instants[-1])
            else:
                if len(instants) < num_ended:  # otherwise counted with all others of the run
                    self._gaps.add_between(instants, 1)
                self._decoded(leg, None if is_cut else output.finish, output.report, instants)

    def _decoded(
        self, leg: SimulatedLeg, finish: FinishReason | None, report: SimReport | None, instants: Sequence[float]
    ) -> None:
        self._drawn(leg, instants)
        if finish is not None:
            del self._legs[leg.name]
            self._done(leg, report, finish)
        elif not leg.num_told:
            self._say(leg, LegOutput(leg.id, _PAYLOAD, leg.untold()))

    def _prefilled(self, leg: SimulatedLeg, kind: PrefillLeg, output: SimOutput, instant: float) -> None:
        del self._legs[leg.name]
        is_answer = leg.max_tokens == 1
        if is_answer or kind.emit_first:
            self._drawn(leg, [instant])
        ticket = None
        if is_answer:
            self._free(leg.name)
        else:
            self.keep(leg.name)
            report, scenario = output.report, self._scenario
            ticket = Ticket(
                worker=self.id,
                mode=kind.mode,
                num_tokens=leg.prompt_tokens + leg.num_resumed,
                lease_s=scenario.lease_s,
                params=str(self.epoch).encode(),
                cached_tokens=0 if report is None else min(report.cached_tokens, leg.prompt_tokens),
            )
        self._done(leg, output.report, FinishReason.LENGTH, ticket)

    def _drawn(self, leg: SimulatedLeg, instants: Sequence[float]) -> None:
        """The client gets tokens that were drawn at these instants."""
        record = leg.record
        if record.token_at is not None:
            self._gaps.add(instants[0] - record.token_at)
        record.token_at = instants[-1]
        leg.num_tokens += len(instants)

    def _done(
        self, leg: SimulatedLeg, report: SimReport | None, finish: FinishReason, ticket: Ticket | None = None
    ) -> None:
        tokens = leg.untold()
        usage = self._usage(leg, report)
        done = Done(_STREAM, finish, usage, _PAYLOAD if tokens else b"", tokens, ticket)
        self._say(leg, LegDone(leg.id, done))

    def _usage(self, leg: SimulatedLeg, report: SimReport | None) -> Usage:
        completion_tokens = leg.num_resumed + leg.num_tokens
        if report is None:
            return Usage(leg.prompt_tokens, completion_tokens, leg.prompt_tokens)
        leg.record.num_preemptions += report.num_preemptions
        ticket = leg.kind.ticket if isinstance(leg.kind, DecodeLeg) else None
        cached_tokens = report.cached_tokens if ticket is None else ticket.cached_tokens
        return Usage(
            prompt_tokens=leg.prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=min(cached_tokens, leg.prompt_tokens),
            queue_s=report.queue_s,
            prefill_s=report.prefill_s,
            handover_s=report.handover_s,
            handover_bytes=report.handover_blocks * self._facts.bytes_per_block,
            decode_s=report.decode_s,
        )

    def _fail(self, leg: SimulatedLeg, kind: FailureKind, code: str, reason: str) -> None:
        self._say(leg, LegFailed(leg.id, leg_error(Failed(_STREAM, kind, code, reason), self.id)))

    def _say(self, leg: SimulatedLeg, event: Event) -> None:
        self._clock.call_later(self._scenario.hop_s, leg.connection.receive, leg, event)

    # --- handovers: the taking side --------------------------------------------------------------------------------

    def _start_handovers(self) -> bool:
        """Fetch what admitted decode legs lack. Returns whether one lacks nothing and may run already."""
        has_ready = False
        for name in self.core.take_admitted():
            leg = self._legs[name]
            ticket = leg.kind.ticket if isinstance(leg.kind, DecodeLeg) else None
            if ticket is None:
                raise RuntimeError(
                    f"leg {name} is to take a KV cache and has no ticket: handovers by push are not simulated"
                )
            giver = self._lives[ticket.worker]
            blocks = self.core.missing_blocks(name)
            if not blocks:
                has_ready = True
                self._clock.call_soon(giver.release, name)
                self.core.handover_arrived(name, now=self._clock.now)
            elif not giver.is_alive or str(giver.epoch).encode() != ticket.params:
                self._giver_lost(leg, giver)
            elif not giver.keeps(name):
                reason = f"its lease of {ticket.lease_s:g} s was over"
                self._clock.call_soon(self._not_taken, leg, "ticket_expired", reason)
            else:
                self._clock.call_at(giver.send(name, blocks, self.id), self._handover_ended, leg, giver)
        return has_ready

    def send(self, name: RequestId, num_blocks: int, taker: WorkerId) -> float:
        """Put a transfer in the line of this worker's NIC; the instant at which it arrives."""
        link = self._scenario.link(self.id, taker)
        num_bytes = num_blocks * self._facts.bytes_per_block
        self.totals.sent_bytes += num_bytes
        start = max(self._clock.now, self._nic_free_at)
        self._nic_free_at = start + num_bytes / link.bytes_per_s
        self._leases.begin_read(name)
        return self._nic_free_at + link.fixed_s

    def _handover_ended(self, leg: SimulatedLeg, giver: "SimulatedWorker") -> None:
        is_wanted = self.is_alive and self._legs.get(leg.name) is leg
        if giver.is_alive:
            giver.sent(leg.name, is_taken=is_wanted)
            if is_wanted:
                self.core.handover_arrived(leg.name, now=self._clock.now)
                self._advance()
        elif is_wanted:
            self._giver_lost(leg, giver)

    def sent(self, name: RequestId, *, is_taken: bool) -> None:
        """A transfer has ended. is_taken: its reader was there to the end."""
        self._leases.end_read(name, is_taken=is_taken)

    def _giver_lost(self, leg: SimulatedLeg, giver: "SimulatedWorker") -> None:
        """Whoever reads from a dead worker notices as late as anybody else."""
        noticed_at = 0.0 if giver.killed_at is None else giver.killed_at + self._scenario.dead_s
        self._clock.call_at(noticed_at, self._not_taken, leg, "engine_error", f"worker {giver.id} does not answer")

    def _not_taken(self, leg: SimulatedLeg, code: str, reason: str) -> None:
        if self.is_alive and self._legs.get(leg.name) is leg:
            self._forget(leg)
            self._fail(leg, FailureKind.INTERRUPTED, code, reason)
            self._advance()

    # --- handovers: the giving side --------------------------------------------------------------------------------

    def keep(self, name: RequestId) -> None:
        """Somebody will fetch the KV cache of this leg."""
        self._leases.add(name)

    def keeps(self, name: RequestId) -> bool:
        return name in self._leases

    def _free(self, name: RequestId) -> None:
        if self.is_alive:
            self.core.release_lease(name, now=self._clock.now)
            self._clock.call_soon(self._advance)

    def _lease_expired(self) -> None:
        if self.is_alive:
            self.totals.num_expired += 1
