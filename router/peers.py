"""Other gateways' requests, counted as our own are.

A worker's reports tell how much it has to do, not for whom: by when a prompt has to be computed, how long a stream may
stand still, when it will end. Whichever gateway bound a request knows, and tells the others.
"""

import math
from collections.abc import Container, Iterable
from typing import Final

from planes.wire.messages import RequestBound, RequestId, RequestNews, RequestPrefilled, RequestReleased, WorkerId
from router.fleet import Fleet
from router.worker import Reservation

_MOST_S: Final = 1e6
"""Further off than a message may say."""
_MOST_BOUND: Final = 100_000
"""Of one gateway."""
_MOST_UNPLACED: Final = 1024


def told_of(reservation: Reservation, now: float) -> RequestBound:
    """What other gateways are told of a request that is bound."""
    is_local = reservation.computing is reservation.decoding
    due_in_s, slo_itl_s = reservation.prefill_due_at - now, reservation.slo_itl_s
    since = reservation.bound_at if reservation.arrived_at == math.inf else reservation.arrived_at
    return RequestBound(
        reservation.request,
        None if is_local else reservation.computing.worker,
        reservation.decoding.worker,
        reservation.prompt_tokens,
        reservation.uncached_tokens,
        reservation.decode_cached_tokens,
        reservation.expected_tokens,
        None if slo_itl_s is None else min(slo_itl_s, _MOST_S),
        None if due_in_s == math.inf else max(-_MOST_S, min(due_in_s, _MOST_S)),
        reservation.is_prefilled,
        min(max(0.0, now - since), _MOST_S),
    )


class PeerRequests:
    """What each other gateway has bound, in our fleet.  own: names of our requests."""

    def __init__(self, fleet: Fleet, *, own: Container[RequestId]) -> None:
        self._fleet = fleet
        self._own = own
        self._bound: dict[str, dict[RequestId, Reservation]] = {}
        self._unplaced: dict[str, set[WorkerId]] = {}
        """Of each gateway the workers that it told of and that were not known here."""

    def __len__(self) -> int:
        return sum(map(len, self._bound.values()))

    def apply(self, gateway: str, news: Iterable[RequestNews], now: float) -> bool:
        """Take in what a gateway tells. A request of a name that is in use, and one of unknown workers, is left out.

        Returns:  whether any request has ended.
        """
        bound, has_ended = self._bound.setdefault(gateway, {}), False
        for told in news:
            reservation = bound.get(told.request)
            match told:
                case RequestBound():
                    self._reserve(gateway, told, now)
                case RequestPrefilled():
                    if reservation is not None:
                        self._fleet.prefilled(reservation, now)
                case RequestReleased():
                    if reservation is not None:
                        self._fleet.release(bound.pop(told.request), told.completion_tokens, now)
                        has_ended = True
        return has_ended

    def _reserve(self, gateway: str, told: RequestBound, now: float) -> None:
        bound = self._bound[gateway]
        if self._is_known(told.request) or len(bound) >= _MOST_BOUND:
            return
        taken = self._fleet.reserve_told(told, now)
        if taken is not None:
            bound[told.request] = taken
            return
        unplaced = self._unplaced.setdefault(gateway, set())
        if len(unplaced) < _MOST_UNPLACED:
            workers = (told.decode,) if told.prefill is None else (told.decode, told.prefill)
            unplaced.update(worker for worker in workers if worker not in self._fleet.workers)

    def _is_known(self, request: RequestId) -> bool:
        return request in self._own or any(request in bound for bound in self._bound.values())

    def incomplete(self) -> list[str]:
        """Gateways that told of requests on workers which are known by now, and were not then."""
        known = self._fleet.workers
        return [gateway for gateway, workers in self._unplaced.items() if any(worker in known for worker in workers)]

    def drop(self, request: RequestId, now: float) -> None:
        """We bind a request of that name ourselves."""
        for bound in self._bound.values():
            if request in bound:
                self._fleet.release(bound.pop(request), 0, now)

    def forget(self, gateway: str, now: float) -> None:
        """It is gone, or something that it told was missed."""
        self._unplaced.pop(gateway, None)
        for reservation in self._bound.pop(gateway, {}).values():
            self._fleet.release(reservation, 0, now)
