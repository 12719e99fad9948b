"""Serves requests: drives each one's exchange (`exchange.py` decides, this file acts).

Everything happens in the turn of the event loop in which it is known; one task a request waits for the end. Between a
leg's first payload and its end its tokens go past all this (`worker_stream.py`).
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import structlog

from app.metrics import Metrics
from app.openai import errors
from app.serving import effects as do
from app.serving import events as on
from app.serving import summary
from app.serving.binding import Clock, Dispatcher
from app.serving.effects import Effect, Noted
from app.serving.events import Event, LegId
from app.serving.exchange import Exchange, State
from app.serving.prefill_queue import NotQueued, Prefilled
from app.serving.request import GatewayRequest
from app.serving.retries import ExchangeLimits
from app.serving.worker_stream import WorkerStream
from planes.streams.client import WorkerConnection, WorkerUnreachable
from planes.wire.errors import HeadraceError, Rejected
from planes.wire.frames import Generate
from planes.wire.messages import Registration, RequestId, WorkerId
from router.request import Route

_log = structlog.get_logger()

_JSON = ("content-type", "application/json")


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


class Workers(Protocol):
    """Where to find a worker. The first two raise WorkerUnreachable if it is not there (any more)."""

    def connection(self, worker: WorkerId) -> WorkerConnection: ...
    def registration(self, worker: WorkerId) -> Registration: ...
    def watch_joins(self, on_joined: Callable[[WorkerId], None]) -> Callable[[], None]:
        """Call `on_joined` with each worker that comes up for routing.  Returns: what ends that."""


class Prefills(Protocol):
    """What `app.serving.prefill_queue.QueuedPrefills` does."""

    async def prefill(self, model: str, request: Generate) -> Prefilled: ...
    def release(self, model: str, job: RequestId, worker: WorkerId) -> None: ...


class Relay:
    """Serves requests. One for each gateway process.

    clock: the event loop's.  prefills: the queue for prompts; None: they are sent to the worker chosen.
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
    ) -> None:
        self.dispatcher = dispatcher
        self.workers = workers
        self.metrics = metrics
        self.clock = clock
        self.limits = limits
        self.prefills = prefills

    async def run(self, request: GatewayRequest, response: Response) -> None:
        """Answer `request`, whatever happens. Raises nothing but CancelledError."""
        if self.prefills is None:
            await self._serve(_Serving(self, request, response, None))
            return
        async with asyncio.TaskGroup() as tasks:  # waiting for the queue is a task of its own
            await self._serve(_Serving(self, request, response, tasks))

    async def _serve(self, serving: "_Serving") -> None:
        serving.start()
        try:
            await serving.ended
        except asyncio.CancelledError:
            serving.receive(on.ClientGone() if serving.response.is_gone else on.Stopping())
            raise
        finally:
            serving.close()


class _Serving:
    """One exchange under way."""

    def __init__(
        self, relay: Relay, request: GatewayRequest, response: Response, tasks: asyncio.TaskGroup | None
    ) -> None:
        loop = asyncio.get_running_loop()
        self.response = response
        self.ended: asyncio.Future[None] = loop.create_future()
        self._relay = relay
        self._request = request
        self._exchange = Exchange(request, relay.limits, has_prefill_queue=relay.prefills is not None)
        self._write = response.write if request.format.is_streaming else None
        self._tasks = tasks
        self._legs: dict[LegId, WorkerStream | asyncio.Task[None]] = {}
        self._events: deque[Event] = deque()
        self._is_receiving = True  # from `start` on
        self._deadline = loop.call_at(request.deadline, self.receive, on.Deadline())
        self._timer: asyncio.TimerHandle | None = None
        self._unwatch: Callable[[], None] | None = None

    def start(self) -> None:
        self._perform(self._exchange.start())
        self._work_off()

    def receive(self, event: Event) -> None:
        """Let the exchange decide, and do what it says. What happens meanwhile waits for its turn."""
        self._events.append(event)
        if not self._is_receiving:
            self._work_off()

    def _work_off(self) -> None:
        exchange, clock = self._exchange, self._relay.clock
        self._is_receiving = True
        while self._events:
            try:
                told = exchange.receive(self._events.popleft(), now=clock())
            except Exception as exc:  # noqa: BLE001 - our own bug: it is logged, and the client gets an answer all the same
                self._bug(exc)
            else:
                self._perform(told)
        self._is_receiving = False
        if exchange.state is State.ENDED and not self.ended.done():
            self.ended.set_result(None)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            try:
                self._PERFORM[type(effect)](self, effect)
            except Exception as exc:  # noqa: BLE001 - the same; and the effects that follow are owed all the same
                self._bug(exc)

    def _bug(self, exc: Exception) -> None:
        _log.exception("request.bug", request_id=self._request.request, exc_info=exc)
        if self._exchange.state is not State.ENDED:
            self._events.append(on.Bug(exc))
        elif not self.response.is_ended:
            self._fail(do.Fail(exc, ()))

    def close(self) -> None:
        """Count and log. Everything else has been given back by the exchange's last effects."""
        for handle in (self._deadline, self._timer):
            if handle is not None:
                handle.cancel()
        if self._unwatch is not None:
            self._unwatch()
        exchange, ended_at = self._exchange, self._relay.clock()
        attempt = exchange.attempt
        told = summary.summary(
            self._request,
            attempt,
            code=exchange.code,
            num_tokens=len(exchange.tokens),
            first_at=exchange.first_at,
            ended_at=ended_at,
        )
        self._relay.metrics.ended(told)
        record = summary.log_record(
            self._request, attempt, told, num_attempts=len(exchange.attempts), ended_at=ended_at
        )
        _log.info("request.finished", **record)

    # --- to the router -------------------------------------------------------------------------------------------

    def _submit(self, effect: do.Submit) -> None:
        try:
            self._relay.dispatcher.submit(effect.request, self._routed)
        except Rejected as exc:
            self.receive(on.RouteRefused(exc))

    def _routed(self, answer: Route | Rejected) -> None:
        if isinstance(answer, Rejected):
            self.receive(on.RouteRefused(answer))
            return
        endpoint = None
        if answer.prefill is not None:
            try:
                endpoint = self._relay.workers.registration(answer.prefill).handover
            except WorkerUnreachable:
                endpoint = None
        self.receive(on.Bound(answer, endpoint))

    def _withdraw(self, _: do.Withdraw) -> None:
        self._relay.dispatcher.withdraw(self._request.request)

    def _mark_prefilled(self, _: do.MarkPrefilled) -> None:
        self._relay.dispatcher.prefilled(self._request.request)

    def _release(self, effect: do.ReleaseReservation) -> None:
        self._relay.dispatcher.release(self._request.request, effect.observed)

    # --- to workers ----------------------------------------------------------------------------------------------

    def _start_leg(self, effect: do.StartLeg) -> None:
        frame = self._generate(effect)
        try:
            connection = self._relay.workers.connection(effect.worker)
            stream = WorkerStream(effect.leg, connection, self.receive, self._exchange.tokens.extend, self._write)
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
        return self._request.generate(effect.kind, effect.name, self._exchange.tokens, now=now)

    def _leg_failed(self, leg: LegId, error: Any) -> None:
        self.receive(on.LegFailed(leg, error))

    def _cancel_leg(self, effect: do.CancelLeg) -> None:
        leg = self._legs.pop(effect.leg, None)
        if leg is not None:
            leg.cancel()

    def _release_ticket(self, effect: do.ReleaseTicket) -> None:
        if effect.job is not None and self._relay.prefills is not None:
            self._relay.prefills.release(self._request.model, effect.job, effect.worker)
            return
        try:
            self._relay.workers.connection(effect.worker).release(effect.name)
        except WorkerUnreachable:
            _log.debug("ticket.not_released", worker=effect.worker)  # the worker frees what it kept for us by itself

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
        fail(self.response, effect.error, effect.headers)

    # --- to the clock, the log and the metrics --------------------------------------------------------------------

    def _wait_until(self, effect: do.WaitUntil) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(effect.instant, self.receive, on.TimeUp())

    def _joined(self, worker: WorkerId) -> None:
        self.receive(on.Joined(worker))

    def _note(self, effect: do.Note) -> None:
        metrics, request = self._relay.metrics, self._request.request
        match effect.what:
            case Noted.RETRIED | Noted.MIGRATED:
                metrics.retried(effect.code, is_migration=effect.what is Noted.MIGRATED)
                if self._unwatch is None:
                    self._unwatch = self._relay.workers.watch_joins(self._joined)
            case Noted.FELL_BACK:
                metrics.fell_back(effect.code)
            case Noted.BYPASSED:
                metrics.queue_bypassed(effect.code)
            case Noted.REPLACED | Noted.GAVE_UP:
                metrics.waited_for_worker(is_replaced=effect.what is Noted.REPLACED)
        _log.warning(effect.what.value, request_id=request, code=effect.code, reason=effect.reason)

    _PERFORM: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        do.Submit: _submit,
        do.Withdraw: _withdraw,
        do.MarkPrefilled: _mark_prefilled,
        do.ReleaseReservation: _release,
        do.StartLeg: _start_leg,
        do.EnqueuePrefill: _enqueue,
        do.CancelLeg: _cancel_leg,
        do.ReleaseTicket: _release_ticket,
        do.Head: _head,
        do.Write: _say,
        do.Finish: _finish,
        do.Reply: _reply,
        do.Fail: _fail,
        do.WaitUntil: _wait_until,
        do.Note: _note,
    }


def fail(response: Response, exc: Exception, headers: do.Headers) -> None:
    """Tell the client, in whatever shape there is still room for."""
    if response.is_begun:
        response.end(errors.sse_event(exc))
    else:
        refusal = errors.response(exc)
        response.whole(refusal.status, [*refusal.headers.items(), *headers], refusal.body)
