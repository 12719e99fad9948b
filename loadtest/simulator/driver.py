"""Drives one exchange on virtual time: what `app/serving/relay.py` is to a real client, without its bytes."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from app.serving import effects as do
from app.serving import events as on
from app.serving.attempt import Attempt
from app.serving.driver import ExchangeDriver
from app.serving.effects import Noted
from app.serving.events import LegId
from app.serving.exchange import Exchange
from app.serving.request import GatewayRequest
from loadtest.simulator.gateway import SimulatedConnection, SimulatedGateway
from loadtest.simulator.leg import SimulatedLeg
from loadtest.simulator.records import Ending, Record
from loadtest.simulator.scenario import MODEL
from loadtest.workloads import Turn
from planes.streams.client import WorkerUnreachable
from planes.wire.errors import Expired, Rejected, UnusableSetting
from planes.wire.frames import Format, Sampling
from planes.wire.messages import RequestId
from router.errors import PolicyFailed
from router.request import Route

_PATIENCE_S = 86_400.0
"""A client's: longer than a run, so that all policies serve the same requests."""


def gateway_request(request: RequestId, turn: Turn, *, block_size: int, now: float, tenant: str = "") -> GatewayRequest:
    """A turn as a gateway has it after parsing: streamed, its answer of the given length. Its tokens have no ids."""
    return GatewayRequest(
        request=request,
        model=MODEL,
        prompt=np.broadcast_to(np.uint32(0), (turn.prompt_tokens,)),
        blocks=turn.blocks[: turn.prompt_tokens // block_size],
        block_size=block_size,
        sampling=Sampling(max_tokens=turn.completion_tokens, ignore_eos=True),
        format=Format("completion", request, MODEL, 0, is_streaming=True),
        arrived_at=now,
        deadline=now + _PATIENCE_S,
        tenant=tenant,
    )


class SimulatedDriver(ExchangeDriver):
    """One exchange under way. on_end: called once, when `record` is complete."""

    def __init__(
        self, gateway: SimulatedGateway, request: GatewayRequest, turn: Turn, record: Record, on_end: Callable[[], None]
    ) -> None:
        clock, exchange = gateway.clock, Exchange(request, gateway.scenario.limits)
        super().__init__(exchange, gateway.dispatcher, gateway, clock=clock.time, call_at=clock.call_at)
        self.record = record
        self._gateway = gateway
        self._request = request
        self._turn = turn
        self._on_end = on_end
        self._legs: dict[LegId, tuple[SimulatedConnection, SimulatedLeg]] = {}
        self._stalled_since: float | None = None
        """When the client got its last token, while it migrates."""

    def _ended(self) -> None:
        if not self.record.code:
            self.close()

    def _bug(self, exc: Exception) -> None:
        raise exc

    def close(self) -> None:
        """Complete the record."""
        super().close()
        record, exchange = self.record, self.exchange
        record.code = exchange.code
        record.num_received = len(exchange.tokens)
        for attempt in exchange.attempts:
            self._observe(attempt)
        record.recomputed_tokens = sum(self._computed_tokens(attempt) for attempt in exchange.attempts[1:])
        self._on_end()

    def _observe(self, attempt: Attempt) -> None:
        """What the last attempt's workers measured stays in the record."""
        record, computed, moved = self.record, attempt.computed, attempt.moved
        if computed is not None:
            record.cached_tokens = computed.cached_tokens
        if moved is not None:
            record.is_handed_over = True
            record.handover_blocks = moved.handover_bytes // self._gateway.scenario.facts.bytes_per_block

    def _computed_tokens(self, attempt: Attempt) -> int:
        """Of the attempt's input: the prompt, and what the client had."""
        if attempt.computed is None:
            return 0
        return len(self._request.prompt) + attempt.num_tokens_before - attempt.computed.cached_tokens

    # --- to the router -------------------------------------------------------------------------------------------

    def _routed(self, answer: Route | Rejected | Expired) -> None:
        if isinstance(answer, Route) and self.record.predicted_ttft_s is None:
            self.record.held_s = answer.held_s
            self.record.predicted_ttft_s = answer.held_s + answer.predicted.ttft_s
        if isinstance(answer, PolicyFailed):  # of a rule that cannot choose there is nothing to compare
            raise UnusableSetting("policy", self._gateway.scenario.policy, f"{answer}: {answer.__cause__}")
        super()._routed(answer)

    # --- to workers ----------------------------------------------------------------------------------------------

    def _start_leg(self, effect: do.StartLeg) -> None:
        try:
            connection = self._gateway.connection(effect.worker)
        except WorkerUnreachable as exc:
            self.receive(on.LegFailed(effect.leg, exc))
            return
        leg = SimulatedLeg(
            id=effect.leg,
            name=effect.name,
            kind=effect.kind,
            prompt_tokens=self._turn.prompt_tokens,
            max_tokens=self._turn.completion_tokens,
            num_resumed=len(self.exchange.tokens),
            blocks=self._turn.blocks,
            record=self.record,
            connection=connection,
            receive=self.receive,
            note=self.exchange.tokens.extend,
        )
        self._legs[effect.leg] = connection, leg
        connection.start(leg)

    def _enqueue(self, effect: do.EnqueuePrefill) -> None:
        self.receive(on.QueueRefused(effect.leg, "no_queue", "simulated fleets have no prefill queue"))

    def _cancel_leg(self, effect: do.CancelLeg) -> None:
        if effect.leg in self._legs:
            connection, leg = self._legs.pop(effect.leg)
            connection.cancel(leg)

    # --- to the client -------------------------------------------------------------------------------------------

    def _head(self, _: do.Head) -> None:
        """Headers are no token: nothing to record."""

    def _write(self, _: do.Write) -> None:
        self._token_arrived()

    def _finish(self, _: do.Finish | do.Reply) -> None:
        self._token_arrived()
        self.record.last_at = self._gateway.clock.now
        self._end(Ending.FINISHED)

    def _token_arrived(self) -> None:
        """The first of an answer, or of a leg, or the last."""
        record, now = self.record, self._gateway.clock.now
        if record.first_at is None:
            record.first_at = now
        if self._stalled_since is not None:
            record.stall_s = max(record.stall_s, now - self._stalled_since)
            self._stalled_since = None

    def _fail(self, _: do.Fail) -> None:
        self._end(Ending.FAILED if self.exchange.attempts else Ending.REJECTED)

    def _end(self, ending: Ending) -> None:
        if self.record.ending is not None:
            raise RuntimeError(f"request {self._request.request} ended twice: {self.record.ending}, then {ending}")
        self.record.ending = ending

    # --- to the counters -------------------------------------------------------------------------------------------

    def _note(self, effect: do.Note) -> None:
        self._gateway.noted[effect.what] += 1
        if effect.what not in {Noted.RETRIED, Noted.MIGRATED}:
            return
        if effect.what is Noted.MIGRATED:
            self.record.num_migrations += 1
            if self._stalled_since is None and self.record.token_at is not None:
                self._stalled_since = self.record.token_at + self._gateway.scenario.hop_s
        else:
            self.record.num_retries += 1
        self._watch_joins()

    PERFORM: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        **ExchangeDriver.PERFORM,
        do.StartLeg: _start_leg,
        do.EnqueuePrefill: _enqueue,
        do.CancelLeg: _cancel_leg,
        do.Head: _head,
        do.Write: _write,
        do.Finish: _finish,
        do.Reply: _finish,
        do.Fail: _fail,
        do.Note: _note,
    }
