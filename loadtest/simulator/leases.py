"""KV caches that one simulated worker keeps for others to fetch."""

from collections.abc import Callable
from dataclasses import dataclass

from loadtest.simulator.clock import Clock, Timer
from planes.wire.messages import RequestId


@dataclass(slots=True)
class _Lease:
    timer: Timer
    is_read: bool = False
    is_over: bool = False
    """Nobody wants it any more; it ends with the reading."""


class Leases:
    """free: gives the blocks of a leg back.  on_expired: told of each lease that ran out."""

    def __init__(
        self, clock: Clock, lease_s: float, *, free: Callable[[RequestId], None], on_expired: Callable[[], None]
    ) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._free = free
        self._on_expired = on_expired
        self._leases: dict[RequestId, _Lease] = {}

    def __contains__(self, name: RequestId) -> bool:
        return name in self._leases

    def add(self, name: RequestId) -> None:
        self._leases[name] = _Lease(self._clock.call_later(self._lease_s, self._expire, name))

    def begin_read(self, name: RequestId) -> None:
        self._leases[name].is_read = True

    def end_read(self, name: RequestId, *, is_taken: bool) -> None:
        lease = self._leases[name]
        lease.is_read = False
        if is_taken or lease.is_over:
            self.end(name)

    def end(self, name: RequestId) -> None:
        """It was taken, or will not be. One that is being read ends when that has. Unknown names are ignored."""
        lease = self._leases.get(name)
        if lease is None:
            return
        if lease.is_read:
            lease.is_over = True
            return
        lease.timer.cancel()
        del self._leases[name]
        self._free(name)

    def _expire(self, name: RequestId) -> None:
        if not self._leases[name].is_read:
            self._on_expired()
        self.end(name)
