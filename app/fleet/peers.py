"""The other gateways: each tells all others of the requests that it has bound (`router/peers.py` says what for).

What a gateway publishes is numbered. Once a second it also tells which others it *hears*: missed nothing of.

| a gateway                                       | then                                                           |
|-------------------------------------------------|----------------------------------------------------------------|
| hears the next number of another one            | takes in what it tells                                         |
| hears another number: something was lost        | forgets what that one told, and hears it no longer             |
| is told by another one that it is not heard     | publishes all that it has bound; from there on it is heard     |
| knows a worker that it did not when told of it  | hears whoever told of it no longer, and so is told all         |
| is told nothing by another one for some seconds | forgets what that one told                                     |

So one that has just started, one that missed something and one that was cut off are brought up to date in the same
way, and where NATS is away each gateway goes by the workers' reports alone.
"""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import structlog

from app.metrics import Gauge
from app.serving.binding import Clock, Dispatcher
from planes.wire.errors import HeadraceError
from planes.wire.floods import is_notable
from planes.wire.messages import GatewayNews, RequestNews
from router.router import Router

_log = structlog.get_logger()

BATCH_S: Final = 0.005
"""For so long what is to be told is gathered: a fraction of an engine's step."""
BEAT_S: Final = 1.0
_SILENT_S: Final = 3.5
_MOST_NEWS: Final = 500  # in a message: about 50 kB
_MOST_GATEWAYS: Final = 1024
_MOST_PAUSE_S: Final = 32.0
_CALM_S: Final = 60.0
"""Who asks for everything so long after the last time is not the same trouble again."""


class NewsPlane(Protocol):
    """What is needed of `planes.events.EventPlane`."""

    async def publish_news(self, news: GatewayNews) -> None: ...
    async def flush(self) -> None:
        """Return when all that was published has been sent.  Raises:  HeadraceError."""


class GatewayPeers:
    """What this gateway tells and is told, without time or network.

    name: of this gateway's start.  wake: called when `take` has something after it had nothing.
    """

    def __init__(self, router: Router, *, name: str, wake: Callable[[], None]) -> None:
        self._router = router
        self._name = name
        self._wake = wake
        self._seq = 0
        self._pending: list[RequestNews] = []
        self._is_beat_due = self._is_whole_due = False
        self._whole_at, self._pause_s = -math.inf, BEAT_S
        """When everything was told last, and for how long it is not told again."""
        self._heard: dict[str, int] = {}
        """The last number of each gateway of which nothing was missed …"""
        self._alive: dict[str, float] = {}
        """… and when each one was last heard at all."""
        self._num_refused = 0

    @property
    def alive(self) -> frozenset[str]:
        """Gateways that have told something lately."""
        return frozenset(self._alive)

    def take(self, *, now: float) -> list[GatewayNews]:
        """What is to be published now, in this order."""
        is_whole = self._is_whole_due and now >= self._whole_at + self._pause_s
        if not (self._pending or self._is_beat_due or is_whole):
            return []
        pending, self._pending = self._pending, []
        messages = self._messages(pending) if pending or self._is_beat_due else []
        if is_whole:
            self._is_whole_due = False
            is_trouble = now < self._whole_at + _CALM_S
            self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S) if is_trouble else BEAT_S
            self._whole_at = now
            messages += self._messages(self._router.all_bound(now=now), is_whole=True)
        return messages

    def _messages(self, news: Sequence[RequestNews], *, is_whole: bool = False) -> list[GatewayNews]:
        messages = []
        for start in range(0, max(1, len(news)), _MOST_NEWS):
            self._seq += 1
            hears = None
            if self._is_beat_due:
                hears, self._is_beat_due = list(self._heard), False
            part = list(news[start : start + _MOST_NEWS])
            messages.append(GatewayNews(self._name, self._seq, part, is_whole and not start, hears))
        return messages

    def beat(self, *, now: float) -> bool:
        """Once in `BEAT_S`: who is silent is forgotten, and all are told that we are there.

        Returns:  whether what was told is counted no longer.
        """
        gone = [gateway for gateway, at in self._alive.items() if now > at + _SILENT_S]
        for gateway in gone:
            del self._alive[gateway]
        lost = [self._lose(gateway, now) for gateway in {*gone, *self._router.incomplete_gateways()}]
        if gone and not self._alive:
            self._router.watch_news(None)
            self._pending.clear()
            self._seq += 1  # what ends from now on is told to nobody
        self._is_beat_due = True
        self._wake()
        return any(lost)

    def hear(self, news: GatewayNews, *, now: float) -> bool:
        """Another gateway tells something; what is our own is ignored.

        Returns:  whether any request of it has ended, or is counted no longer.
        """
        gateway = news.gateway
        if gateway == self._name or (gateway not in self._alive and len(self._alive) >= _MOST_GATEWAYS):
            return False
        if not self._alive:  # what was bound alone was told to nobody
            self._router.watch_news(self._collect)
            self._is_whole_due = True
        self._alive[gateway] = now
        if news.hears is not None and self._name not in news.hears:
            self._is_whole_due = True
        if self._is_whole_due:
            self._wake()
        is_next = news.seq == self._heard.get(gateway, 0) + 1
        has_ended = False
        if not is_next:
            has_ended = self._lose(gateway, now)
            if not news.is_whole:
                return has_ended
        self._heard[gateway] = news.seq
        try:
            return self._router.apply_news(gateway, news.news, now=now) or has_ended
        except Exception as exc:  # noqa: BLE001 - what was told is at fault, and there will be more
            self._num_refused += 1
            if is_notable(self._num_refused):
                reason = f"{type(exc).__name__}: {exc}"
                _log.warning("peer.refused", gateway=gateway, total=self._num_refused, reason=reason)
            return self._lose(gateway, now)

    def _lose(self, gateway: str, now: float) -> bool:
        if self._heard.pop(gateway, None) is None:
            return False
        self._router.forget_gateway(gateway, now=now)
        return True

    def _collect(self, news: RequestNews) -> None:
        self._pending.append(news)
        if len(self._pending) == 1:
            self._wake()

    def gauges(self) -> Iterator[Gauge]:
        """For the metrics."""
        yield Gauge("peer_gateways", "Other gateways of which this one knows what they have bound.", len(self._heard))


class PeerNews:
    """Carries what `GatewayPeers` says over NATS, and to it. `run` does the waiting."""

    def __init__(self, router: Router, dispatcher: Dispatcher, plane: NewsPlane, *, name: str, clock: Clock) -> None:
        self._dispatcher = dispatcher
        self._plane = plane
        self._clock = clock
        self._woken = asyncio.Event()
        self._peers = GatewayPeers(router, name=name, wake=self._woken.set)
        self.gauges = self._peers.gauges

    def told(self, news: GatewayNews) -> None:
        """Another gateway, or this one, has told something."""
        if self._peers.hear(news, now=self._clock()):
            self._dispatcher.changed()

    async def run(self) -> None:
        """Tell and count the others until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            while True:
                await self._woken.wait()
                await asyncio.sleep(BATCH_S)
                self._woken.clear()
                try:
                    await self._tell(self._peers.take(now=self._clock()))
                except HeadraceError as exc:
                    _log.debug("peer.not_told", reason=str(exc))
                except Exception:  # noqa: BLE001 - our own bug, and requests are served without this
                    _log.exception("peer.bug")

    async def _tell(self, messages: Sequence[GatewayNews]) -> None:
        """One after the other: the connection's buffer is everybody's. What is not sent is missed, and asked for."""
        for number, message in enumerate(messages, 1):
            await self._plane.publish_news(message)
            if number < len(messages):
                await self._plane.flush()

    async def _beat(self) -> None:
        known: frozenset[str] = frozenset()
        while True:
            try:
                if self._peers.beat(now=self._clock()):
                    self._dispatcher.changed()
            except Exception:  # noqa: BLE001 - as above
                _log.exception("peer.bug")
            before, known = known, self._peers.alive
            for gateway in known - before:
                _log.info("peer.heard", gateway=gateway)
            for gateway in before - known:
                _log.info("peer.gone", gateway=gateway)
            await asyncio.sleep(BEAT_S)
