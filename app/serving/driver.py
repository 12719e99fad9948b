"""What every driver of an exchange does, in the gateway and in the simulator: it tells events and performs effects.

Where legs run and what the client sees is for each driver to say; the way to the router, waiting, and whoever waits for
a worker to come up are the same for all.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol

import structlog

from app.serving import effects as do
from app.serving import events as on
from app.serving.binding import Clock, Dispatcher, Timer
from app.serving.effects import Effect
from app.serving.events import Event
from app.serving.exchange import Exchange, State
from planes.streams.client import WorkerUnreachable
from planes.wire.errors import Expired, Rejected
from planes.wire.messages import Registration, RequestId, WorkerId
from router.request import Route

_log = structlog.get_logger()

_ENDED: Final = State.ENDED  # bound once, see CONTRIBUTING.md

CallAt = Callable[[float, Callable[[Event], None], Event], Timer]
"""As an event loop's `call_at`, at an instant on the driver's clock."""


class Releasing(Protocol):
    """The stream to a worker, for what it keeps."""

    def release(self, request: RequestId, /) -> None: ...


class Workers(Protocol):
    """Where to find a worker. The first two raise WorkerUnreachable if it is not there (any more)."""

    def connection(self, worker: WorkerId) -> Releasing: ...
    def registration(self, worker: WorkerId) -> Registration: ...
    def watch_joins(self, on_joined: Callable[[WorkerId], None]) -> Callable[[], None]:
        """Call `on_joined` with each worker that comes up for routing.  Returns: what ends that."""


class ExchangeDriver:
    """One exchange under way. A subclass adds to `PERFORM`, and says what an end and a bug of ours mean."""

    __slots__ = (
        "_call_at",
        "_clock",
        "_dispatcher",
        "_events",
        "_is_receiving",
        "_name",
        "_timer",
        "_unwatch",
        "_workers",
        "exchange",
    )

    def __init__(
        self, exchange: Exchange, dispatcher: Dispatcher, workers: Workers, *, clock: Clock, call_at: CallAt
    ) -> None:
        self.exchange = exchange
        self._name = exchange.request.request
        self._dispatcher = dispatcher
        self._workers = workers
        self._clock = clock
        self._call_at = call_at
        self._events: list[Event] = []  # a deque would take 600 bytes of every stream
        self._is_receiving = True  # from `start` on
        self._timer: Timer | None = None
        self._unwatch: Callable[[], None] | None = None

    def start(self) -> None:
        """Ask for the first route."""
        self.perform(self.exchange.start(now=self._clock()))
        self._work_off()

    def receive(self, event: Event) -> None:
        """Let the exchange decide, and do what it says. What happens meanwhile waits for its turn."""
        self._events.append(event)
        if not self._is_receiving:
            self._work_off()

    def perform(self, effects: list[Effect]) -> None:
        """Do all of it, in order: what follows an effect that fails is owed all the same."""
        for effect in effects:
            try:
                self.PERFORM[type(effect)](self, effect)
            except Exception as exc:  # noqa: BLE001 - our own bug: it is this request's alone
                self._bug(exc)

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._unwatch is not None:
            self._unwatch()

    def _work_off(self) -> None:
        self._is_receiving = True
        while self._events:
            try:
                told = self.exchange.receive(self._events.pop(0), now=self._clock())
            except Exception as exc:  # noqa: BLE001 - the same
                self._bug(exc)
            else:
                self.perform(told)
        self._is_receiving = False
        if self.exchange.state is _ENDED:
            self._ended()

    def _ended(self) -> None:
        """The exchange has ended; may be called again for an event that came late."""
        raise NotImplementedError

    def _bug(self, exc: Exception) -> None:
        """Our own code has raised `exc`."""
        raise NotImplementedError

    # --- to the router -------------------------------------------------------------------------------------------

    def _submit(self, effect: do.Submit) -> None:
        try:
            self._dispatcher.submit(effect.request, self._routed)
        except Rejected as exc:
            self.receive(on.RouteRefused(exc))

    def _routed(self, answer: Route | Rejected | Expired) -> None:
        if isinstance(answer, Rejected | Expired):
            self.receive(on.RouteRefused(answer))
            return
        endpoint = None
        if answer.prefill is not None:
            try:
                endpoint = self._workers.registration(answer.prefill).handover
            except WorkerUnreachable:
                endpoint = None
        self.receive(on.Bound(answer, endpoint))

    def _withdraw(self, _: do.Withdraw) -> None:
        self._dispatcher.withdraw(self._name)

    def _mark_prefilled(self, _: do.MarkPrefilled) -> None:
        self._dispatcher.prefilled(self._name)

    def _release(self, effect: do.ReleaseReservation) -> None:
        self._dispatcher.release(self._name, effect.observed)

    # --- to workers, and to the clock ------------------------------------------------------------------------------

    def _release_ticket(self, effect: do.ReleaseTicket) -> None:
        try:
            self._workers.connection(effect.worker).release(effect.name)
        except WorkerUnreachable:
            _log.debug("ticket.not_released", worker=effect.worker)  # the worker frees what it kept for us by itself

    def _wait_until(self, effect: do.WaitUntil) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._call_at(effect.instant, self.receive, on.TimeUp())

    def _watch_joins(self) -> None:
        """From the first failure on, a worker that comes up may matter."""
        if self._unwatch is None:
            self._unwatch = self._workers.watch_joins(self._joined)

    def _joined(self, worker: WorkerId) -> None:
        self.receive(on.Joined(worker))

    PERFORM: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        do.Submit: _submit,
        do.Withdraw: _withdraw,
        do.MarkPrefilled: _mark_prefilled,
        do.ReleaseReservation: _release,
        do.ReleaseTicket: _release_ticket,
        do.WaitUntil: _wait_until,
    }
