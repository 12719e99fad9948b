"""The event loop around the router: requests wait here, `Router` decides.

    submit ──► waiting ── dispatch ──► bound ── release (once, however it ends)
                  ├── dispatch refuses ──► Rejected
                  └── the caller is cancelled ──► withdrawn

The router is asked again in the same turn of the loop in which anything changed, and at the instant it asks for.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from planes.wire.messages import RequestId
from router.errors import PolicyFailed
from router.request import Observed, Outcome, RoutableRequest, Route
from router.router import Refusal, Router

_log = structlog.get_logger()

Clock = Callable[[], float]


class Dispatcher:
    """Turns the router's answers into something to await. One for each router."""

    def __init__(self, router: Router, *, clock: Clock) -> None:
        self._router = router
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[RequestId, asyncio.Future[Route | Refusal]] = {}
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def routed(self, request: RoutableRequest, observe: Callable[[], Observed]) -> AsyncIterator[Route]:
        """Wait for a route and hold its reservation; `observe` says at the end what really happened.

        Raises:  Rejected if the router refuses.
        """
        route = await self._bound(request)
        try:
            yield route
        finally:
            self._release(request.request, observe())

    def prefilled(self, request: RequestId) -> None:
        """The prompt has been computed."""
        self._router.prefilled(request, now=self._clock())
        self.changed()

    def changed(self) -> None:
        """Something that the router knows has changed; it will be asked before this turn of the loop is over."""
        if self._soon is None:
            self._soon = self._loop.call_soon(self._dispatch)

    def stop(self) -> None:
        """Ask the router no more."""
        for handle in (self._soon, self._timer):
            if handle is not None:
                handle.cancel()

    async def _bound(self, request: RoutableRequest) -> Route:
        self._router.submit(request, now=self._clock())
        waiting: asyncio.Future[Route | Refusal] = self._loop.create_future()
        self._waiting[request.request] = waiting
        self.changed()
        try:
            answer = await waiting
        except asyncio.CancelledError:
            # The route may have come in the very turn in which the caller was cancelled: then it is ours to give back.
            if _is_bound(waiting):
                self._release(request.request, Observed(outcome=Outcome.CANCELLED))
            else:
                self._router.withdraw(request.request, now=self._clock())
                self.changed()
            raise
        finally:
            self._waiting.pop(request.request, None)
        if isinstance(answer, Refusal):
            raise answer.error
        return answer

    def _release(self, request: RequestId, observed: Observed) -> None:
        self._router.release(request, observed, now=self._clock())
        self.changed()

    def _dispatch(self) -> None:
        self._soon = None
        now = self._clock()
        try:
            answers = self._router.dispatch(now=now)
        except Exception as exc:  # noqa: BLE001 - our own bug must not leave requests hanging
            _log.exception("dispatch.bug")
            self._give_up(exc, now)
            return
        for answer in answers:
            if isinstance(answer, Refusal) and isinstance(answer.error, PolicyFailed):
                _log.error("policy.failed", request_id=answer.request, exc_info=answer.error.__cause__)
            waiting = self._waiting.get(answer.request)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
            elif isinstance(answer, Route):
                # Its caller was cancelled in this turn and will not withdraw what it does not know to be bound.
                self._release(answer.request, Observed(outcome=Outcome.CANCELLED))
        self._set_timer(now)

    def _give_up(self, exc: Exception, now: float) -> None:
        for request, waiting in self._waiting.items():
            self._router.withdraw(request, now=now)
            if not waiting.done():
                waiting.set_exception(exc)

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wakeup = self._router.wakeup()
        if wakeup is not None:
            self._timer = self._loop.call_later(max(0.001, wakeup - now), self.changed)


def _is_bound(waiting: asyncio.Future[Route | Refusal]) -> bool:
    is_answered = waiting.done() and not waiting.cancelled() and waiting.exception() is None
    return is_answered and isinstance(waiting.result(), Route)
