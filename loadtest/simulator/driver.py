"""Drives one exchange on virtual time: what `app/serving/relay.py` is to a real client, without its bytes."""

from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from app.serving import effects as do
from app.serving import events as on
from app.serving.attempt import Attempt
from app.serving.effects import Effect, Noted
from app.serving.events import Event, LegId
from app.serving.exchange import Exchange, State
from app.serving.request import GatewayRequest
from loadtest.simulator.clock import Timer
from loadtest.simulator.gateway import SimulatedConnection, SimulatedGateway
from loadtest.simulator.leg import SimulatedLeg
from loadtest.simulator.records import Ending, Record
from loadtest.simulator.scenario import MODEL
from loadtest.workloads import Turn
from planes.streams.client import WorkerUnreachable
from planes.wire.errors import Rejected
from planes.wire.frames import Format, Sampling
from planes.wire.messages import RequestId, WorkerId
from router.request import Route

_PATIENCE_S = 86_400.0
"""A client's: longer than a run, so that all policies serve the same requests."""


def gateway_request(request: RequestId, turn: Turn, *, block_size: int, now: float) -> GatewayRequest:
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
    )


class ExchangeDriver:
    """One exchange under way. on_end: called once, when `record` is complete."""

    def __init__(
        self, gateway: SimulatedGateway, request: GatewayRequest, turn: Turn, record: Record, on_end: Callable[[], None]
    ) -> None:
        self.exchange = Exchange(request, gateway.scenario.limits)
        self.record = record
        self._gateway = gateway
        self._request = request
        self._turn = turn
        self._on_end = on_end
        self._legs: dict[LegId, tuple[SimulatedConnection, SimulatedLeg]] = {}
        self._events: deque[Event] = deque()
        self._is_receiving = True  # from `start` on
        self._timer: Timer | None = None
        self._unwatch: Callable[[], None] | None = None
        self._stalled_since: float | None = None
        """When the client got its last token, while it migrates."""

    def start(self) -> None:
        self.perform(self.exchange.start())
        self._work_off()

    def receive(self, event: Event) -> None:
        """Let the exchange decide, and do what it says. What happens meanwhile waits for its turn."""
        self._events.append(event)
        if not self._is_receiving:
            self._work_off()

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.PERFORM[type(effect)](self, effect)

    def _work_off(self) -> None:
        self._is_receiving = True
        while self._events:
            self.perform(self.exchange.receive(self._events.popleft(), now=self._gateway.clock.now))
        self._is_receiving = False
        if self.exchange.state is State.ENDED and not self.record.code:
            self._close()

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._unwatch is not None:
            self._unwatch()
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

    def _submit(self, effect: do.Submit) -> None:
        try:
            self._gateway.dispatcher.submit(effect.request, self._routed)
        except Rejected as exc:
            self.receive(on.RouteRefused(exc))

    def _routed(self, answer: Route | Rejected) -> None:
        if isinstance(answer, Rejected):
            self.receive(on.RouteRefused(answer))
            return
        if self.record.predicted_ttft_s is None:
            self.record.held_s = answer.held_s
            self.record.predicted_ttft_s = answer.held_s + answer.predicted.ttft_s
        endpoint = None
        if answer.prefill is not None:
            try:
                endpoint = self._gateway.registration(answer.prefill).handover
            except WorkerUnreachable:
                endpoint = None
        self.receive(on.Bound(answer, endpoint))

    def _withdraw(self, _: do.Withdraw) -> None:
        self._gateway.dispatcher.withdraw(self._request.request)

    def _mark_prefilled(self, _: do.MarkPrefilled) -> None:
        self._gateway.dispatcher.prefilled(self._request.request)

    def _release(self, effect: do.ReleaseReservation) -> None:
        self._gateway.dispatcher.release(self._request.request, effect.observed)

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

    def _release_ticket(self, effect: do.ReleaseTicket) -> None:
        try:
            self._gateway.connection(effect.worker).release(effect.name)
        except WorkerUnreachable:
            return  # what it kept is gone with it

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

    # --- to the clock and the counters -----------------------------------------------------------------------------

    def _wait_until(self, effect: do.WaitUntil) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._gateway.clock.call_at(effect.instant, self.receive, on.TimeUp())

    def _joined(self, worker: WorkerId) -> None:
        self.receive(on.Joined(worker))

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
        if self._unwatch is None:
            self._unwatch = self._gateway.watch_joins(self._joined)

    PERFORM: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        do.Submit: _submit,
        do.Withdraw: _withdraw,
        do.MarkPrefilled: _mark_prefilled,
        do.ReleaseReservation: _release,
        do.StartLeg: _start_leg,
        do.EnqueuePrefill: _enqueue,
        do.CancelLeg: _cancel_leg,
        do.ReleaseTicket: _release_ticket,
        do.Head: _head,
        do.Write: _write,
        do.Finish: _finish,
        do.Reply: _finish,
        do.Fail: _fail,
        do.WaitUntil: _wait_until,
        do.Note: _note,
    }
