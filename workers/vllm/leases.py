"""KV caches that wait in vLLM to be fetched, and who gives them up before their time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from planes.wire.messages import RequestId


class CallLater(Protocol):
    """The event loop's."""

    def __call__(self, delay: float, callback: Callable[..., None], /, *args: Any) -> asyncio.TimerHandle: ...


class Leases:
    """Of one engine. For vLLM's front end these requests have ended, so that they go by the engine's own names."""

    def __init__(self, lease_s: float, abort: Callable[[list[str]], Awaitable[None]], *, call_later: CallLater) -> None:
        """abort: vLLM's, of requests by the engine's names. Its answer may take long, or never come."""
        self._lease_s = lease_s
        self._abort = abort
        self._call_later = call_later
        self._names: dict[RequestId, str] = {}
        self._aborting: set[asyncio.Future[None]] = set()

    def keep(self, request: RequestId, name: str) -> None:
        """vLLM keeps the KV cache of `request`, which it calls `name`."""
        self._names[request] = name
        self._call_later(self._lease_s, self._expired, request, name)

    def release(self, request: RequestId) -> None:
        """Nobody will fetch it (pull; one that is pushed may be on its way). Forgotten at once, whatever vLLM says."""
        name = self._names.pop(request, None)
        if name is not None:
            aborting = asyncio.ensure_future(self._abort([name]))
            self._aborting.add(aborting)
            aborting.add_done_callback(self._aborting.discard)

    async def stop(self) -> None:
        """Wait for no answer any more."""
        aborting = [*self._aborting]
        for each in aborting:
            each.cancel()
        await asyncio.gather(*aborting, return_exceptions=True)

    def _expired(self, request: RequestId, name: str) -> None:
        if self._names.get(request) == name:
            del self._names[request]
