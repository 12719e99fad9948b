"""Other gateways' requests, counted as our own are.

A worker's reports tell how much it has to do, not for whom: by when a prompt has to be computed, how long a stream may
stand still, when it will end. Whichever gateway bound a request knows, and tells the others.
"""

import math
from collections.abc import Container, Iterable

from planes.wire.messages import RequestBound, RequestId, RequestNews, RequestPrefilled, RequestReleased
from router.fleet import Fleet
from router.worker import Reservation


def told_of(reservation: Reservation, now: float) -> RequestBound:
    """What other gateways are told of a request that is bound."""
    is_local = reservation.computing is reservation.decoding
    due_in_s = reservation.prefill_due_at - now
    return RequestBound(
        reservation.request,
        None if is_local else reservation.computing.worker,
        reservation.decoding.worker,
        reservation.prompt_tokens,
        reservation.uncached_tokens,
        reservation.decode_cached_tokens,
        reservation.expected_tokens,
        reservation.slo_itl_s,
        None if due_in_s == math.inf else due_in_s,
        reservation.is_prefilled,
    )


class PeerRequests:
    """What each other gateway has bound, in our fleet.  own: names of our requests."""

    def __init__(self, fleet: Fleet, *, own: Container[RequestId]) -> None:
        self._fleet = fleet
        self._own = own
        self._bound: dict[str, dict[RequestId, Reservation]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._bound.values()))

    def apply(self, gateway: str, news: Iterable[RequestNews], now: float) -> None:
        """Take in what a gateway tells. A request of a name that is in use, and one of unknown workers, is left out."""
        bound = self._bound.setdefault(gateway, {})
        for told in news:
            reservation = bound.get(told.request)
            match told:
                case RequestBound():
                    taken = None if self._is_known(told.request) else self._fleet.reserve_told(told, now)
                    if taken is not None:
                        bound[told.request] = taken
                case RequestPrefilled():
                    if reservation is not None:
                        self._fleet.prefilled(reservation, now)
                case RequestReleased():
                    if reservation is not None:
                        self._fleet.release(bound.pop(told.request), told.completion_tokens, now)

    def _is_known(self, request: RequestId) -> bool:
        return request in self._own or any(request in bound for bound in self._bound.values())

    def forget(self, gateway: str, now: float) -> None:
        """It is gone, or something that it told was missed."""
        for reservation in self._bound.pop(gateway, {}).values():
            self._fleet.release(reservation, 0, now)
