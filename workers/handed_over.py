"""The KV caches that a worker's engine keeps for decode workers, and when they are given up before their lease is over.

A prefill leg that ends with a ticket leaves its KV cache in the engine, which frees it when it has been fetched or its
lease is over. Sooner if nobody will come:

    Cancel that crossed Done, Release        → at once
    the gateway's connection is gone         → after a quarter of the lease: the gateway may live, and a decode worker
                                               be fetching; it has fetched by then, or told the engine that it waits
    this worker hears nobody any more        → likewise
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from planes.wire.frames import StreamId
from planes.wire.messages import RequestId

_ORPHANED_SHARE = 0.25
"""Share of its lease for which a KV cache is kept on when its gateway's connection is gone. vLLM's decode engine says
within a sixth of the lease that it waits."""


class Timer(Protocol):
    """What `loop.call_later` returns."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


@dataclass(frozen=True, slots=True)
class _Kept:
    connection: object
    stream: StreamId
    lease_s: float
    timer: Timer


class HandedOver:
    """What is kept, by request. `give_up` is called for each that nobody will fetch."""

    def __init__(self, give_up: Callable[[RequestId], None], call_later: CallLater) -> None:
        self._give_up = give_up
        self._call_later = call_later
        self._kept: dict[RequestId, _Kept] = {}
        self._requests: dict[tuple[object, StreamId], RequestId] = {}
        """The same by connection and stream."""

    def keep(self, request: RequestId, connection: object, stream: StreamId, lease_s: float) -> None:
        timer = self._call_later(lease_s, partial(self.forget, request))
        self._kept[request] = _Kept(connection, stream, lease_s, timer)
        self._requests[connection, stream] = request

    def forget(self, request: RequestId) -> None:
        """It is the engine's again: its lease is over, or another request has its name."""
        kept = self._kept.pop(request, None)
        if kept is not None:
            kept.timer.cancel()
            self._requests.pop((kept.connection, kept.stream), None)

    def release(self, request: RequestId) -> None:
        """Nobody will fetch it, whether it is kept by what we know or not."""
        self.forget(request)
        self._give_up(request)

    def cancelled(self, connection: object, stream: StreamId) -> None:
        """A stream was cancelled after it had ended: its ticket has not been heard of."""
        request = self._requests.get((connection, stream))
        if request is not None:
            self.release(request)

    def gone(self, connection: object) -> None:
        for request, kept in self._kept.items():
            if kept.connection is connection:
                self._orphan(request, kept)

    def hear_no_more(self) -> None:
        """Nobody can release anything here any more."""
        for request, kept in self._kept.items():
            self._orphan(request, kept)

    def _orphan(self, request: RequestId, kept: _Kept) -> None:
        kept.timer.cancel()
        timer = self._call_later(kept.lease_s * _ORPHANED_SHARE, partial(self.release, request))
        self._kept[request] = replace(kept, timer=timer)
