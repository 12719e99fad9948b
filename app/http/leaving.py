"""How a gateway leaves a load balancer, then its clients.

    SERVING ── signal ──► LEAVING ── delay over, or signal ──► DRAINING ── signal ──► cut off
                          /health is 503, requests are taken   listener closed, answers end

Without a delay LEAVING is passed at once.
"""

from collections.abc import Callable
from typing import Protocol

import structlog

_log = structlog.get_logger()


class Timer(Protocol):
    """What `asyncio.TimerHandle` does."""

    def cancel(self) -> None: ...


class Departure:
    """One gateway's. delay_s: between `/health` saying no and the listener closing."""

    is_under_way = False

    def __init__(self, delay_s: float, *, call_later: Callable[[float, Callable[[], None]], Timer]) -> None:
        self._delay_s = delay_s
        self._call_later = call_later
        self._timer: Timer | None = None

    def signalled(self, stop: Callable[[], None]) -> None:
        """The process is asked to end.  stop: closes the listener; called again, ends what is still answered."""
        if not self.is_under_way and self._delay_s > 0:
            self.is_under_way = True
            _log.info("gateway.leaving", health=503, listens_for_s=self._delay_s)
            self._timer = self._call_later(self._delay_s, stop)
            return
        self.is_under_way = True
        if self._timer is not None:
            self._timer.cancel()
        stop()
