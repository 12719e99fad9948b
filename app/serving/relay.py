"""Serves requests: drives each one's exchange (`exchange.py` decides, this file acts).

Everything happens in the turn of the event loop in which it is known, the end and its bookkeeping too; nobody need wait
for it. Between a leg's first payload and its end its tokens go past all this (`worker_stream.py`).
"""

import asyncio
import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import structlog

from app.metrics import Metrics, RequestSummary
from app.serving import driver, summary
from app.serving import effects as do
from app.serving import events as on
from app.serving.binding import Clock, Dispatcher
from app.serving.driver import ExchangeDriver
from app.serving.effects import Noted
from app.serving.events import Event, LegId
from app.serving.exchange import Exchange, State
from app.serving.prefill_queue import NotQueued, Prefilled
from app.serving.request import GatewayRequest
from app.serving.retries import ExchangeLimits
from app.serving.timeline import Ending
from app.serving.worker_stream import WorkerStream
from planes.streams.client import WorkerConnection, WorkerUnreachable
from planes.wire.blocks import Tokens
from planes.wire.errors import HeadraceError
from planes.wire.frames import Done, Generate
from planes.wire.messages import RequestId, WorkerId
from router.timeline import Timeline

_log = structlog.get_logger()

_JSON = ("content-type", "application/json")
_LEAST_WAIT_S = 0.001
"""uvloop rounds to milliseconds: a timer may come early, and what is left of the wait must not round to nothing."""


class Response(Protocol):
    """What `app.http.response.StreamedResponse` does."""

    @property
    def is_gone(self) -> bool: ...
    @property
    def is_begun(self) -> bool: ...
    @property
    def is_ended(self) -> bool: ...
    def begin(self, headers: do.Headers) -> None: ...
    def write(self, payload: bytes) -> None: ...
    def end(self, last: bytes = b"") -> None: ...
    def whole(self, status: int, headers: do.Headers, body: bytes) -> None: ...
    def fail(self, exc: Exception, headers: do.Headers) -> None: ...
    def keep_alive(self) -> None: ...


class Workers(driver.Workers, Protocol):
    """What a driver needs of them, with streams that carry legs."""

    def connection(self, worker: WorkerId) -> WorkerConnection: ...


class Prefills(Protocol):
    """What `app.serving.prefill_queue.QueuedPrefills` does."""

    async def prefill(self, model: str, request: Generate) -> Prefilled: ...
    def release(self, model: str, job: RequestId, worker: WorkerId) -> None: ...


class Recorder(Protocol):
    """What `app.recording.Recorder` does."""

    def ended(self, prompt: Tokens, root: str, *, completion_tokens: int, ago_s: float) -> None: ...


class Tracer(Protocol):
    """What `app.telemetry.tracing.Tracing` does."""

    def ended(self, request: GatewayRequest, timeline: Timeline) -> None: ...


class Relay:
    """Serves requests. One for each gateway process.

    clock: a monotonic one.  prefills: the queue for prompts; None: they are sent to the worker chosen.
    keepalive_s: longest silence of a stream; 0: it may be silent.  recorder: told of every request that was served.
    tracer: told of every request that has ended.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        workers: Workers,
        metrics: Metrics,
        *,
        clock: Clock,
        limits: ExchangeLimits,
        prefills: Prefills | None = None,
        keepalive_s: float = 0.0,
        recorder: Recorder | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.workers = workers
        self.metrics = metrics
        self.clock = clock
        self.limits = limits
        self.prefills = prefills
        self.keepalive_s = keepalive_s
        self.recorder = recorder
        self.tracer = tracer

    async def run(self, request: GatewayRequest, response: Response) -> None:
        """Answer `request`, whatever happens. Raises nothing but CancelledError."""
        if self.prefills is None:
            await self._serve(request, response, None)
            return
        async with asyncio.TaskGroup() as tasks:  # waiting for the queue is a task of its own
            await self._serve(request, response, tasks)

    def begin(self, request: GatewayRequest, response: Response, on_end: Callable[[], object]) -> "Serving":
        """Answer `request`, whatever happens, without a task. Only where there is no queue for prompts.

        on_end: called once when it has ended, which may be before this returns.
        """
        serving = Serving(self, request, response, None, on_end)
        serving.start()
        return serving

    def call_at(self, instant: float, call: Callable[[Event], None], event: Event) -> asyncio.TimerHandle:
        """As an event loop's, at an instant on `clock`."""
        wait_s = max(_LEAST_WAIT_S, instant - self.clock())
        return asyncio.get_running_loop().call_later(wait_s, call, event)

    async def _serve(self, request: GatewayRequest, response: Response, tasks: asyncio.TaskGroup | None) -> None:
        ended = asyncio.Event()
        serving = Serving(self, request, response, tasks, ended.set)
        serving.start()
        try:
            await ended.wait()
        except asyncio.CancelledError:
            serving.leave()
            raise
        finally:
            serving.close()


class Serving(ExchangeDriver):
    """One exchange under way, for a client. Made by `Relay`."""

    __slots__ = (
        "__weakref__",  # by which a test sees that it is freed
        "_alarm",
        "_comment_at",
        "_is_closed",
        "_is_prompt_spent",
        "_is_rest_prompt",
        "_legs",
        "_on_end",
        "_relay",
        "_request",
        "_rest_tokens",
        "_spent",
        "_tasks",
        "_write",
        "response",
    )

    def __init__(
        self,
        relay: Relay,
        request: GatewayRequest,
        response: Response,
        tasks: asyncio.TaskGroup | None,
        on_end: Callable[[], object],
    ) -> None:
        exchange = Exchange(request, relay.limits, has_prefill_queue=relay.prefills is not None)
        super().__init__(exchange, relay.dispatcher, relay.workers, clock=relay.clock, call_at=relay.call_at)
        self.response = response
        self._relay = relay
        self._on_end = on_end
        self._request = request
        self._write = response.write if request.format.is_streaming else None
        self._tasks = tasks
        self._legs: dict[LegId, WorkerStream | asyncio.Task[None]] = {}
        self._spent = self._rest_tokens = 0
        self._is_prompt_spent = self._is_rest_prompt = self._is_closed = False
        self._comment_at = math.inf
        """Instant at which a stream that has been silent gets a comment."""
        if relay.keepalive_s and request.format.is_streaming:
            self._comment_at = relay.clock() + relay.keepalive_s
        self._set_alarm()

    def leave(self) -> None:
        """The client has gone, or else the gateway stops."""
        self.receive(on.ClientGone() if self.response.is_gone else on.Stopping())

    def _ended(self) -> None:
        if not self._is_closed:
            try:
                self.close()
            except Exception:  # noqa: BLE001 - in the books: whoever told it of its end has others to tell
                _log.exception("request.bug", **summary.log_ids(self._request))
            finally:
                self._on_end()

    def _bug(self, exc: Exception) -> None:
        """It is logged, and the client gets an answer all the same."""
        _log.exception("request.bug", **summary.log_ids(self._request), exc_info=exc)
        if self.exchange.state is not State.ENDED:
            self._events.append(on.Bug(exc))
        elif not self.response.is_ended:
            self._fail(do.Fail(exc, ()))

    def _set_alarm(self) -> None:
        """One timer for whatever comes first: each takes 600 bytes of a stream."""
        wait_s = min(self._request.deadline, self._comment_at) - self._relay.clock()
        self._alarm = asyncio.get_running_loop().call_later(max(_LEAST_WAIT_S, wait_s), self._time_up)

    def _time_up(self) -> None:
        now = self._relay.clock()
        if now >= self._request.deadline:
            self.receive(on.Deadline())
            return
        try:
            if now >= self._comment_at:
                self._keep_alive(now)
        finally:
            if not self._is_closed:
                self._set_alarm()

    def _keep_alive(self, now: float) -> None:
        """Once the whole interval has passed, then twice in each: so no silence is longer than one."""
        self.receive(on.Silence())
        if not self.response.is_ended:
            self.response.keep_alive()
        self._comment_at = now + self._relay.keepalive_s / 2

    def close(self) -> None:
        """Count and log, once. Everything else has been given back by the exchange's last effects."""
        if self._is_closed:
            return
        self._is_closed = True
        super().close()
        self._alarm.cancel()
        self._tell_spent()
        exchange = self.exchange
        ended_at = self._relay.clock() if exchange.ended_at is None else exchange.ended_at
        attempt = exchange.attempt
        told = summary.summary(
            self._request,
            attempt,
            code=exchange.code,
            num_tokens=len(exchange.tokens),
            first_at=exchange.first_at,
            ended_at=ended_at,
            overhead_s=exchange.overhead_s,
        )
        self._relay.metrics.ended(told)
        ending = Ending.of(exchange, told, ended_at=ended_at)
        self._dispatcher.ended(self._name, ending.timeline)
        if self._relay.tracer is not None:
            self._relay.tracer.ended(self._request, ending.timeline())
        if self._relay.recorder is not None:
            self._record(self._relay.recorder, told, ended_at)
        record = summary.log_record(
            self._request, attempt, told, num_attempts=len(exchange.attempts), ended_at=ended_at
        )
        _log.info("request.finished", **record)
        self._legs.clear()  # their sinks know this object: nothing is to wait for the garbage collector

    def _tell_spent(self) -> None:
        """Tell the meter what it has not heard. A prompt counts once, when a worker has computed all of it."""
        exchange, request = self.exchange, self._request
        if request.meter is None:
            return
        completion_tokens = len(exchange.tokens) + self._rest_tokens
        is_computed = completion_tokens > 0 or self._is_rest_prompt or exchange.first_at is not None
        is_computed = is_computed or any(attempt.prefilled_at is not None for attempt in exchange.attempts)
        is_news = is_computed and not self._is_prompt_spent
        prompt_tokens, more = len(request.prompt) if is_news else 0, completion_tokens - self._spent
        self._is_prompt_spent, self._spent = is_computed, completion_tokens
        if prompt_tokens or more:
            request.meter.spent(prompt_tokens=prompt_tokens, completion_tokens=more)

    def _rested(self, done: Done) -> None:
        """What a worker had computed when it heard that nobody waits any more; the last of it was still under way."""
        if done.ticket is not None:
            self._is_rest_prompt = True  # its one token is the decode worker's to say
        else:
            self._rest_tokens = max(0, done.usage.completion_tokens - len(self.exchange.tokens))
        if self._is_closed:
            self._tell_spent()

    def _record(self, recorder: Recorder, told: RequestSummary, ended_at: float) -> None:
        """What no worker has computed is left out. Choices count as one answer as long as their mean."""
        request = self._request
        if told.completion_tokens or told.code == "ok":
            recorder.ended(
                request.prompt,
                "\0".join((request.model, request.cache_salt, *([request.adapter.tag] if request.adapter else ()))),
                completion_tokens=max(1, round(told.completion_tokens / request.sampling.n)),
                ago_s=ended_at - request.arrived_at,
            )

    # --- to workers ----------------------------------------------------------------------------------------------

    def _start_leg(self, effect: do.StartLeg) -> None:
        frame = self._generate(effect)
        try:
            connection = self._relay.workers.connection(effect.worker)
            stream = WorkerStream(effect.leg, connection, self.receive, self.exchange.tokens.extend, self._write)
            stream.start(frame)
        except WorkerUnreachable as exc:
            self._leg_failed(effect.leg, exc)
        else:
            self._legs[effect.leg] = stream

    def _enqueue(self, effect: do.EnqueuePrefill) -> None:
        if self._tasks is None or self._relay.prefills is None:
            raise RuntimeError("a prompt was to be queued, and there is no queue")
        self._legs[effect.leg] = self._tasks.create_task(self._prefilled(effect, self._relay.prefills))

    async def _prefilled(self, effect: do.EnqueuePrefill, prefills: Prefills) -> None:
        try:
            given = await prefills.prefill(self._request.model, self._generate(effect))
        except NotQueued as exc:
            self.receive(on.QueueRefused(effect.leg, exc.code, str(exc)))
        except HeadraceError as exc:
            self._leg_failed(effect.leg, exc)
        except Exception as exc:  # noqa: BLE001 - as in `receive`: ours, and this request's alone
            self.receive(on.Bug(exc))
        else:
            self.receive(on.LegDone(effect.leg, given.done, given.worker, given.job))

    def _generate(self, effect: do.StartLeg | do.EnqueuePrefill) -> Generate:
        now = self._relay.clock()
        return self._request.generate(effect.kind, effect.name, self.exchange.tokens, now=now)

    def _leg_failed(self, leg: LegId, error: Any) -> None:
        self.receive(on.LegFailed(leg, error))

    def _cancel_leg(self, effect: do.CancelLeg) -> None:
        leg = self._legs.pop(effect.leg, None)
        if isinstance(leg, WorkerStream) and self.exchange.state is State.ENDED and self._request.meter is not None:
            leg.cancel(self._rested)
        elif leg is not None:
            leg.cancel()

    def _release_ticket(self, effect: do.ReleaseTicket) -> None:
        if effect.job is not None and self._relay.prefills is not None:
            self._relay.prefills.release(self._request.model, effect.job, effect.worker)
        else:
            super()._release_ticket(effect)

    # --- to the client -------------------------------------------------------------------------------------------

    def _head(self, effect: do.Head) -> None:
        self.response.begin(effect.headers)

    def _say(self, effect: do.Write) -> None:
        self.response.write(effect.payload)

    def _finish(self, effect: do.Finish) -> None:
        self.response.end(effect.payload)

    def _reply(self, effect: do.Reply) -> None:
        self.response.whole(200, [_JSON, *effect.headers], effect.payload)

    def _fail(self, effect: do.Fail) -> None:
        self.response.fail(effect.error, effect.headers)

    # --- to the log and the metrics --------------------------------------------------------------------------------

    def _note(self, effect: do.Note) -> None:
        metrics = self._relay.metrics
        match effect.what:
            case Noted.RETRIED | Noted.MIGRATED:
                metrics.retried(effect.code, is_migration=effect.what is Noted.MIGRATED)
                self._watch_joins()
            case Noted.FELL_BACK:
                metrics.fell_back(effect.code)
            case Noted.BYPASSED:
                metrics.queue_bypassed(effect.code)
            case Noted.REPLACED | Noted.GAVE_UP:
                metrics.waited_for_worker(is_replaced=effect.what is Noted.REPLACED)
        _log.warning(effect.what.value, **summary.log_ids(self._request), code=effect.code, reason=effect.reason)

    PERFORM: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        **ExchangeDriver.PERFORM,
        do.StartLeg: _start_leg,
        do.EnqueuePrefill: _enqueue,
        do.CancelLeg: _cancel_leg,
        do.ReleaseTicket: _release_ticket,
        do.Head: _head,
        do.Write: _say,
        do.Finish: _finish,
        do.Reply: _reply,
        do.Fail: _fail,
        do.Note: _note,
    }
