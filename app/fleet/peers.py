"""The other gateways: each tells all others of the requests that it has bound (`router/peers.py` says what for).

What a gateway publishes is numbered. Once a second it also tells which others it *hears*: missed nothing of.

| a gateway                                       | then                                                           |
|-------------------------------------------------|----------------------------------------------------------------|
| hears the next number of another one            | takes in what it tells                                         |
| hears a later number: something was lost        | forgets what that one told, and hears it no longer             |
| is told by another one that it is not heard     | publishes all that it has bound; from there on it is heard     |
| is told nothing by another one for some seconds | forgets what that one told                                     |

So one that has just started, one that missed something and one that was cut off are brought up to date in the same
way, and where NATS is away each gateway goes by the workers' reports alone.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import structlog

from app.metrics import Gauge
from app.serving.binding import Clock, Dispatcher
from planes.wire.messages import GatewayNews, RequestNews
from router.router import Router

_log = structlog.get_logger()

BATCH_S: Final = 0.005
"""For so long what is to be told is gathered: a fraction of an engine's step."""
BEAT_S: Final = 1.0
_SILENT_S: Final = 3.5
_MOST_NEWS: Final = 1000  # in a message: about 100 kB


class NewsPlane(Protocol):
    """What is needed of `planes.events.EventPlane`."""

    async def publish_news(self, news: GatewayNews) -> None: ...


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
        if not (self._pending or self._is_beat_due or self._is_whole_due):
            return []
        pending, self._pending = self._pending, []
        is_whole, self._is_whole_due = self._is_whole_due, False
        if is_whole:
            pending = list(self._router.all_bound(now=now))
        messages = []
        for start in range(0, max(1, len(pending)), _MOST_NEWS):
            self._seq += 1
            hears = None
            if self._is_beat_due:
                hears, self._is_beat_due = list(self._heard), False
            part = pending[start : start + _MOST_NEWS]
            messages.append(GatewayNews(self._name, self._seq, part, is_whole and not start, hears))
        return messages

    def beat(self, *, now: float) -> None:
        """Once in `BEAT_S`: who is silent is forgotten, and all are told that we are there."""
        for gateway in [gateway for gateway, at in self._alive.items() if now > at + _SILENT_S]:
            del self._alive[gateway]
            self._lose(gateway, now)
        if not self._alive:
            self._router.watch_news(None)
            self._pending.clear()
        self._is_beat_due = True
        self._wake()

    def hear(self, news: GatewayNews, *, now: float) -> None:
        """Another gateway tells something; what is our own is ignored."""
        gateway = news.gateway
        if gateway == self._name:
            return
        if not self._alive:  # what was bound alone was told to nobody
            self._router.watch_news(self._collect)
            self._is_whole_due = True
        self._alive[gateway] = now
        if news.hears is not None and self._name not in news.hears:
            self._is_whole_due = True
        if self._is_whole_due:
            self._wake()
        last = self._heard.get(gateway, 0)
        if news.is_whole and news.seq > last:
            self._router.forget_gateway(gateway, now=now)
        elif news.seq != last + 1:
            if news.seq > last:
                self._lose(gateway, now)
            return
        self._heard[gateway] = news.seq
        try:
            self._router.apply_news(gateway, news.news, now=now)
        except Exception as exc:  # noqa: BLE001 - what was told is at fault, and there will be more
            self._lose(gateway, now)
            self._num_refused += 1
            if self._num_refused.bit_count() == 1:
                reason = f"{type(exc).__name__}: {exc}"
                _log.warning("peer.refused", gateway=gateway, total=self._num_refused, reason=reason)

    def _lose(self, gateway: str, now: float) -> None:
        if self._heard.pop(gateway, None) is not None:
            self._router.forget_gateway(gateway, now=now)

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
        self._peers.hear(news, now=self._clock())
        self._dispatcher.changed()

    async def run(self) -> None:
        """Tell and count the others until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            while True:
                await self._woken.wait()
                await asyncio.sleep(BATCH_S)
                self._woken.clear()
                for message in self._peers.take(now=self._clock()):
                    await self._plane.publish_news(message)

    async def _beat(self) -> None:
        known: frozenset[str] = frozenset()
        while True:
            self._peers.beat(now=self._clock())
            before, known = known, self._peers.alive
            for gateway in known - before:
                _log.info("peer.heard", gateway=gateway)
            for gateway in before - known:
                _log.info("peer.gone", gateway=gateway)
            await asyncio.sleep(BEAT_S)
