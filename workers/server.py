"""The worker's side of the streams: each Generate becomes an engine request and is answered once.

    state     output     complete  error            cancelled     deadline
    QUEUED    → RUNNING  → Done    → interrupted    → Done,abort  → rejected
    RUNNING   → RUNNING  → Done    → interrupted    → Done,abort  → interrupted

A request that has ended stands in no table any more and hears nothing, so there is no second answer to give. Every
ending but the engine's own takes the request back from the engine at once.
What becomes of a KV cache that was handed over: `handed_over.py`.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import Protocol

import msgspec
import structlog

from planes.wire.errors import ROLE_CHANGED, HeadraceError, InvalidRequest, Rejected
from planes.wire.frames import (
    DecodeLeg,
    Delta,
    Done,
    Failed,
    FailureKind,
    FinishReason,
    Generate,
    Leg,
    Parsing,
    PrefillLeg,
    StreamId,
    Ticket,
    Usage,
)
from planes.wire.messages import HandoverMode, RequestId, Role
from workers.answer.detokenizer import Vocabulary
from workers.answer.formatter import Formatter
from workers.answer.parts import AnswerParser
from workers.answer.vector import VectorAnswer
from workers.engine.base import Engine, EngineOutput, EngineRequest, is_drawn_again
from workers.handed_over import CallLater, HandedOver, Timer
from workers.parsers import Parsers
from workers.validate import admit, is_for

_log = structlog.get_logger()


class WorkerBusy(Rejected):
    """The worker has as many requests as it takes."""

    code = "worker_busy"

    def __init__(self, requests: int, limit: int) -> None:
        super().__init__(f"{requests} requests run or wait here and the limit is {limit}")


class WorkerDraining(Rejected):
    """The worker is about to stop."""

    code = "worker_draining"

    def __init__(self) -> None:
        super().__init__("this worker finishes what it has and takes no new requests")


class RequestIdTaken(Rejected):
    """The engine tells requests apart by their ids."""

    code = "duplicate_request"

    def __init__(self, request: RequestId) -> None:
        super().__init__(f"a request named {request} already runs here")


Answer = Formatter | VectorAnswer


class Connection(Protocol):
    """What a request needs of `planes.streams.server.GatewayConnection`."""

    def post(self, item: Delta | Done | Failed) -> None: ...


class Tally(Protocol):
    """What `workers.metrics.WorkerMetrics` does."""

    def done(self, leg: Leg, usage: Usage, reason: FinishReason) -> None: ...
    def failed(self, code: str) -> None: ...


class _State(Enum):
    QUEUED = auto()
    RUNNING = auto()
    ENDED = auto()


class _RunningRequest:
    """One request on one stream."""

    __slots__ = (
        "_measured",
        "connection",
        "formatter",
        "held_payload",
        "held_tokens",
        "prompt_tokens",
        "request",
        "state",
        "timer",
    )

    def __init__(self, connection: Connection, request: Generate, prompt_tokens: int, formatter: Answer) -> None:
        self.connection = connection
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.formatter = formatter
        self.state = _State.QUEUED
        self.timer: Timer | None = None
        self.held_payload = b""
        self.held_tokens: list[int] = []
        self._measured: EngineOutput | None = None

    def measure(self, output: EngineOutput) -> None:
        """Remember what the engine measured: told with choice 0's last output, perhaps with its first one too."""
        if output.index == 0 and (output.finish is not None or self._measured is None):
            self._measured = output

    @property
    def has_output(self) -> bool:
        """Whether the prompt has been computed."""
        return self._measured is not None

    def usage(self) -> Usage:
        leg, output = self.request.leg, self._measured or EngineOutput(0, ())
        cached_tokens = output.cached_tokens
        if isinstance(leg, DecodeLeg) and leg.ticket is not None:
            cached_tokens = leg.ticket.cached_tokens  # the prompt was computed by whoever gave the ticket
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.formatter.completion_tokens,
            cached_tokens=min(cached_tokens, self.prompt_tokens),  # tokens resumed with may be cached too
            queue_s=output.queue_s,
            prefill_s=output.prefill_s,
            handover_s=output.handover_s,
            handover_bytes=output.handover_bytes,
            decode_s=output.decode_s,
            reasoning_tokens=self.formatter.reasoning_tokens,
        )


class WorkerServer:
    """Runs what gateways ask for; the handler of `planes.streams.server.StreamServer`."""

    def __init__(
        self,
        engine: Engine,
        *,
        role: Role,
        vocabulary: Vocabulary,
        end_tokens: frozenset[int],
        max_queued: int,
        call_later: CallLater,
        parsers: Parsers | None = None,
    ) -> None:
        """
        Args:  engine: started.  parsers: what reads calls and thoughts in answers; None: nothing.
        end_tokens: the model's end-of-sequence ids.  max_queued: requests taken beyond those
        that the engine runs at once.  call_later: the event loop's.
        """
        self._engine = engine
        self._role: Role | None = role
        self._vocabulary = vocabulary
        self._parsers = parsers
        self._spelt = vocabulary if parsers is None else parsers.spelling(vocabulary)
        """For answers that are parsed."""
        self._all_spelt = vocabulary.spelling_all()
        self._end_tokens = end_tokens
        self._limit = engine.facts.max_batch + max_queued
        self._call_later = call_later
        self._running: dict[Connection, dict[StreamId, _RunningRequest]] = {}
        self._requests: set[RequestId] = set()
        self._handed_over = HandedOver(self._give_up, call_later)
        self.prompt_tokens = self.completion_tokens = 0
        """Of requests that have ended well or were cancelled: what gateways were told, and count for their keys."""
        self.adapters: set[int] = set()
        """Numbers of those that requests may come with."""
        self._is_draining = False
        self._has_ended = asyncio.Event()
        """Set by each request's end."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.tally: Tally | None = None
        """Is told of each leg's end; None: nobody is."""

    @property
    def role(self) -> Role | None:
        """What is taken now; None: nothing."""
        return None if self._is_draining else self._role

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def drain(self) -> None:
        """Take no new requests."""
        self._is_draining = True

    def change_role(self, role: Role | None) -> None:
        """Take what this role does from now on, or nothing; what runs here goes on."""
        self._role = role

    def num_beyond(self, role: Role) -> int:
        """Requests that run here and would not be taken in this role."""
        return len(self._beyond(role))

    async def until_within(self, role: Role) -> None:
        """Wait until no request is left that would not be taken in this role."""
        while self._beyond(role):
            self._has_ended.clear()
            await self._has_ended.wait()

    def move_beyond(self, role: Role) -> None:
        """Give up what would not be taken in this role, and which gateways can go on with elsewhere."""
        for running in self._beyond(role):
            sampling = running.request.sampling
            if sampling.n == 1 or not running.request.format.is_streaming:
                reason = f"this worker's role becomes {role}"
                self._fail(running, FailureKind.INTERRUPTED, ROLE_CHANGED, reason)

    def _beyond(self, role: Role) -> list["_RunningRequest"]:
        everything = (running for streams in self._running.values() for running in streams.values())
        return [running for running in everything if not is_for(role, running.request.leg)]

    def num_with(self, adapter: int) -> int:
        """Requests that run here with an adapter."""
        everything = (running.request.adapter for streams in self._running.values() for running in streams.values())
        return sum(each is not None and each.number == adapter for each in everything)

    async def until_without(self, adapter: int) -> None:
        """Wait until no request with it is left."""
        while self.num_with(adapter):
            self._has_ended.clear()
            await self._has_ended.wait()

    async def until_idle(self) -> None:
        """Wait until no request is left."""
        await self._idle.wait()

    def interrupt_all(self, code: str, message: str) -> None:
        """Give every request up; gateways continue them elsewhere."""
        for streams in list(self._running.values()):
            for running in list(streams.values()):
                self._fail(running, FailureKind.INTERRUPTED, code, message)

    # --- what gateways say ----------------------------------------------------------------------------------------

    def generate(self, connection: Connection, request: Generate) -> None:
        self._abort(connection, request.stream)  # a gateway that uses a stream again has forgotten what ran there
        try:
            self._begin(connection, self._admitted(request), request)
        except HeadraceError as exc:
            self._not_begun(connection, request.stream, exc)
        except Exception:  # noqa: BLE001 - a defect ends its own request, and not its gateway's connection
            _log.exception("request.bug", request_id=request.request)
            defect = HeadraceError("this worker could not begin the request; its log says why")
            self._not_begun(connection, request.stream, defect)

    def _not_begun(self, connection: Connection, stream: StreamId, error: HeadraceError) -> None:
        self._abort(connection, stream)  # it may have begun in part
        self._refuse(connection, stream, error)

    def cancel(self, connection: Connection, stream: StreamId) -> None:
        """The last word on it is what it has used: the gateway has not heard of tokens that are under way."""
        running = self._abort(connection, stream)
        if running is not None:
            self._add_up(running)
            connection.post(Done(stream, FinishReason.ABORT, running.usage()))

    def _abort(self, connection: Connection, stream: StreamId) -> _RunningRequest | None:
        """Take back what runs there, and say nothing."""
        running = self._running.get(connection, {}).get(stream)
        if running is None:
            self._handed_over.cancelled(connection, stream)
        else:
            self._end(running)
            self._engine.abort(running.request.request)
        return running

    def release(self, connection: Connection, request: RequestId) -> None:  # noqa: ARG002 - any gateway may say it
        """Give up the KV cache kept for a request that has been handed over; one that runs here goes on."""
        self._handed_over.release(request)

    def gone(self, connection: Connection) -> None:
        for stream in list(self._running.get(connection, ())):
            self._abort(connection, stream)
        self._handed_over.gone(connection)

    def hear_no_more(self) -> None:
        """Nobody can release anything here any more: what has been handed over shall not keep the engine for long."""
        self._handed_over.hear_no_more()

    def _give_up(self, request: RequestId) -> None:
        if request not in self._requests:
            self._engine.abort(request)

    # --- one request's life ----------------------------------------------------------------------------------------

    def _admitted(self, request: Generate) -> EngineRequest:
        if self._is_draining:
            raise WorkerDraining
        if request.request in self._requests:
            raise RequestIdTaken(request.request)
        admitted = admit(
            request,
            role=self._role,
            facts=self._engine.facts,
            endpoint=self._engine.endpoint,
            adapters=self.adapters,
        )
        if len(self._requests) >= self._limit:
            raise WorkerBusy(len(self._requests), self._limit)
        return admitted

    def _begin(self, connection: Connection, admitted: EngineRequest, request: Generate) -> None:
        formatter = VectorAnswer() if admitted.is_embedding else self._formatter(admitted, request)
        self._handed_over.forget(request.request)  # the engine does so, too, when it gets a request of that name
        running = _RunningRequest(connection, request, len(admitted.prompt), formatter)
        if admitted.resume and isinstance(formatter, Formatter):
            finish = self._resumed(formatter, admitted)
            if finish is not None:
                payload = formatter.end(finish) + formatter.finish(running.usage())
                connection.post(Done(request.stream, finish, running.usage(), payload))
                return
        self._requests.add(request.request)
        self._running.setdefault(connection, {})[request.stream] = running
        self._idle.clear()
        running.timer = self._call_later(request.timeout_s, partial(self._expire, running))
        self._engine.submit(admitted, partial(self._take, running))

    def _formatter(self, admitted: EngineRequest, request: Generate) -> Formatter:
        parser = self._parser_of(request.format.parsing, admitted)
        return Formatter(
            request.format,
            request.sampling,
            self._vocabulary_of(request, is_parsed=parser is not None),
            end_tokens=self._end_tokens,
            prompt=admitted.prompt,
            parser=parser,
        )

    def _parser_of(self, parsing: Parsing | None, admitted: EngineRequest) -> Callable[[], AnswerParser] | None:
        if parsing is None or self._parsers is None:
            return None
        return self._parsers.maker(parsing, admitted.prompt)

    def _vocabulary_of(self, request: Generate, *, is_parsed: bool) -> Vocabulary:
        if not request.sampling.is_special_skipped:
            return self._all_spelt
        return self._spelt if is_parsed else self._vocabulary

    def _resumed(self, formatter: Formatter, admitted: EngineRequest) -> FinishReason | None:
        """Fold what the client has got. Returns how the answer ended, if those tokens were all of it."""
        resume, sampling = admitted.resume, admitted.sampling
        stop_tokens = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._end_tokens)
        is_stopped = resume[-1] in stop_tokens
        formatter.fold(resume, is_stopped=is_stopped)
        if is_stopped:
            return FinishReason.STOP
        return formatter.finish_reason or (FinishReason.LENGTH if len(resume) >= sampling.max_tokens else None)

    def _take(self, running: _RunningRequest, output: EngineOutput) -> None:
        """News from the engine."""
        if running.state is _State.ENDED:
            return  # it ended while this was under way
        running.state = _State.RUNNING
        running.measure(output)
        if output.refusal is not None:
            self._end(running)
            self._refuse(running.connection, running.request.stream, output.refusal)
        elif output.finish in (FinishReason.ERROR, FinishReason.ABORT):
            self._engine_failed(running, output)
        elif isinstance(running.request.leg, PrefillLeg):
            self._prefilled(running, running.request.leg, output)
        else:
            self._decoded(running, output)

    def _decoded(self, running: _RunningRequest, output: EngineOutput) -> None:
        payload, tokens = running.formatter.feed(output)
        finish = running.formatter.finish_reason
        if finish is not None:
            self._complete(running, finish, payload, list(tokens), is_engine_done=output.finish is not None)
        elif tokens:
            running.connection.post(Delta(running.request.stream, payload, list(tokens)))

    def _prefilled(self, running: _RunningRequest, leg: PrefillLeg, output: EngineOutput) -> None:
        """The engine stops after one token; whether that ends the answer is for the request's own limits to say."""
        request, formatter = running.request, running.formatter
        num_resumed = len(request.resume) // 4
        is_answer = output.finish is FinishReason.STOP and output.ticket is None
        if is_drawn_again(leg, request.sampling, num_resumed=num_resumed) and not is_answer:
            self._unheard(running, output)
            return
        num_tokens = num_resumed + len(running.held_tokens) + len(output.tokens)
        is_limit = output.finish is FinishReason.LENGTH and num_tokens < request.sampling.max_tokens
        payload, tokens = formatter.feed(replace(output, finish=None) if is_limit else output)
        running.held_payload += payload
        running.held_tokens += tokens
        if formatter.finish_reason is not None:
            # Nobody will pull; but who is pushed to has begun already and waits for the KV cache.
            is_engine_done = leg.mode is HandoverMode.PUSH and output.finish is not None
            self._complete(
                running,
                formatter.finish_reason,
                running.held_payload,
                running.held_tokens,
                is_engine_done=is_engine_done,
            )
        elif output.ticket is not None:
            self._hand_over(running, output.ticket, is_emitting=leg.emit_first)
        elif output.finish is not None:
            self._fail(running, FailureKind.INTERRUPTED, "ticket_missing", "the engine kept no KV cache to hand over")

    def _unheard(self, running: _RunningRequest, output: EngineOutput) -> None:
        """The decode worker draws the first token anew: this one counts for nothing, only the ticket does."""
        if output.ticket is not None:
            self._hand_over(running, output.ticket, is_emitting=False)
        elif output.finish is not None:
            self._fail(running, FailureKind.INTERRUPTED, "ticket_missing", "the engine kept no KV cache to hand over")

    def _hand_over(self, running: _RunningRequest, ticket: Ticket, *, is_emitting: bool) -> None:
        usage = running.usage()
        self._add_up(running, is_answer=False)
        payload, tokens = (running.held_payload, running.held_tokens) if is_emitting else (b"", [])
        ticket = msgspec.structs.replace(ticket, cached_tokens=usage.cached_tokens)
        self._end(running)
        request = running.request
        self._handed_over.keep(request.request, running.connection, request.stream, ticket.lease_s)
        running.connection.post(Done(request.stream, FinishReason.LENGTH, usage, payload, tokens, ticket))
        self._count(running, usage, FinishReason.LENGTH)

    def _complete(
        self, running: _RunningRequest, finish: FinishReason, payload: bytes, tokens: list[int], *, is_engine_done: bool
    ) -> None:
        self._end(running)
        if not is_engine_done or running.request.sampling.n > 1:
            self._engine.abort(running.request.request)
        usage = running.usage()
        self._add_up(running)
        payload += running.formatter.finish(usage)
        running.connection.post(Done(running.request.stream, finish, usage, payload, tokens))
        self._count(running, usage, finish)

    def _count(self, running: _RunningRequest, usage: Usage, reason: FinishReason) -> None:
        if self.tally is not None:
            self.tally.done(running.request.leg, usage, reason)

    def _fail(
        self, running: _RunningRequest, kind: FailureKind, code: str, message: str, *, reason: str | None = None
    ) -> None:
        """reason: what the log says; by default the message."""
        self._end(running)
        self._engine.abort(running.request.request)
        running.connection.post(Failed(running.request.stream, kind, code, message))
        if self.tally is not None:
            self.tally.failed(code)
        reason = message if reason is None else reason
        _log.warning("request.failed", request_id=running.request.request, kind=kind, code=code, reason=reason)

    def _refuse(self, connection: Connection, stream: StreamId, error: HeadraceError) -> None:
        connection.post(_failed(stream, error))
        if self.tally is not None:
            self.tally.failed(error.code)

    def _engine_failed(self, running: _RunningRequest, output: EngineOutput) -> None:
        """Clients hear what it is called; the engine's words, and its libraries', are for the log."""
        message = "the engine could not go on with this request; its worker's log says why"
        self._fail(running, FailureKind.INTERRUPTED, f"engine_{output.finish}", message, reason=output.error)

    def _expire(self, running: _RunningRequest) -> None:
        kind = FailureKind.REJECTED if running.state is _State.QUEUED else FailureKind.INTERRUPTED
        message = f"not finished {running.request.timeout_s:g} s after it arrived here"
        self._fail(running, kind, "deadline_exceeded", message)

    def _add_up(self, running: _RunningRequest, *, is_answer: bool = True) -> None:
        """A prompt counts where it was computed, an answer's tokens where it ended."""
        if running.has_output and not isinstance(running.request.leg, DecodeLeg):
            self.prompt_tokens += running.prompt_tokens
        if is_answer:
            self.completion_tokens += running.formatter.completion_tokens

    def _end(self, running: _RunningRequest) -> None:
        """Forget the request: from here on nothing reaches it."""
        running.state = _State.ENDED
        if running.timer is not None:
            running.timer.cancel()
        streams = self._running[running.connection]
        del streams[running.request.stream]
        if not streams:
            del self._running[running.connection]
        self._requests.discard(running.request.request)
        self._has_ended.set()
        if not self._requests:
            self._idle.set()


def _failed(stream: StreamId, error: HeadraceError) -> Failed:
    if isinstance(error, InvalidRequest):
        return Failed(stream, FailureKind.INVALID, error.code, str(error), error.param)
    kind = FailureKind.REJECTED if isinstance(error, Rejected) else FailureKind.INTERRUPTED
    return Failed(stream, kind, error.code, str(error))
