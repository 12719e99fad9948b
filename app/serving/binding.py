"""The event loop around the router: requests wait here, `Router` decides.

    submit ──► waiting ── dispatch ──► bound ── release (once, however it ends)
                  ├── dispatch refuses ──► told
                  └── withdraw

The router is asked again in the same turn of the loop in which anything changed, and at the instant it asks for.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from app.watchers import Watchers
from planes.wire.errors import Expired, Rejected
from planes.wire.messages import RequestId
from router.errors import PolicyFailed
from router.request import Observed, Outcome, RoutableRequest, Route
from router.router import Refusal, Router
from router.timeline import Timeline

_log = structlog.get_logger()

Clock = Callable[[], float]

OnAnswer = Callable[[Route | Rejected | Expired], None]
"""Takes the router's answer, once; must not raise."""


class Timer(Protocol):
    """What an event loop's `call_soon` and `call_later` return."""

    def cancel(self) -> None: ...


class Timers(Protocol):
    """What is needed of an event loop; the simulator has one on virtual time."""

    def call_soon(self, callback: Callable[[], Any], /) -> Timer: ...
    def call_later(self, delay: float, callback: Callable[[], Any], /) -> Timer: ...


class RouterBroken(Rejected):
    """The router itself raised: our own bug, which is logged."""

    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("The server had an internal error; it has been logged.")


class Dispatcher:
    """Passes the router's answers on. One for each router. timers: None means the running event loop."""

    def __init__(self, router: Router, *, clock: Clock, timers: Timers | None = None) -> None:
        self._router = router
        self._clock = clock
        self._timers: Timers = timers or asyncio.get_running_loop()
        self._waiting: dict[RequestId, OnAnswer] = {}
        self._soon: Timer | None = None
        self._timer: Timer | None = None
        self.endings: Watchers[Timeline] = Watchers()
        """Who is told of requests that have ended."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: RoutableRequest, on_answer: OnAnswer) -> None:
        """Ask for a route, whose reservation holds until `release`.

        Raises:  Rejected if the router refuses at once; `on_answer` is not called then.
        """
        self._router.submit(request, now=self._clock())
        self._waiting[request.request] = on_answer
        self.changed()

    def withdraw(self, request: RequestId) -> None:
        """Take the question back: it is not answered any more."""
        if self._waiting.pop(request, None) is not None:
            self._router.withdraw(request, now=self._clock())
            self.changed()

    def prefilled(self, request: RequestId) -> None:
        """The prompt has been computed."""
        self._router.prefilled(request, now=self._clock())
        self.changed()

    def release(self, request: RequestId, observed: Observed) -> None:
        """Give a bound request's reservation back, and say what came of it."""
        self._router.release(request, observed, now=self._clock())
        self.changed()

    def ended(self, request: RequestId, timeline: Callable[[], Timeline]) -> None:
        """A request has ended: what is kept of its decision can tell where its time went."""
        self._router.ended(request, timeline)
        if len(self.endings):
            self.endings.tell(timeline())

    def changed(self) -> None:
        """Something that the router knows has changed; it will be asked before this turn of the loop is over."""
        if self._soon is None:
            self._soon = self._timers.call_soon(self._dispatch)

    def stop(self) -> None:
        """Ask the router no more."""
        for handle in (self._soon, self._timer):
            if handle is not None:
                handle.cancel()

    def _dispatch(self) -> None:
        self._soon = None
        now = self._clock()
        try:
            answers = self._router.dispatch(now=now)
        except Exception:  # noqa: BLE001 - our own bug must not leave requests hanging
            _log.exception("dispatch.bug")
            self._give_up(now)
            return
        for answer in answers:
            if isinstance(answer, Refusal) and isinstance(answer.error, PolicyFailed):
                _log.error("policy.failed", request_id=answer.request, exc_info=answer.error.__cause__)
            on_answer = self._waiting.pop(answer.request)
            on_answer(answer.error if isinstance(answer, Refusal) else answer)
        self._set_timer(now)

    def _give_up(self, now: float) -> None:
        """Nobody who waits can be served, and nothing may stay reserved for them: some may have been bound."""
        waiting, self._waiting = self._waiting, {}
        for request, on_answer in waiting.items():
            self._router.withdraw(request, now=now)
            if self._router.is_bound(request):
                self._router.release(request, Observed(outcome=Outcome.FAILED), now=now)
            on_answer(RouterBroken())

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wakeup = self._router.wakeup()
        if wakeup is not None:
            self._timer = self._timers.call_later(max(0.001, wakeup - now), self.changed)
