"""Headrace: the way of serving a request that costs everybody the least, in predicted seconds; bound late.

No weights: `router/predict.py` has the cost. A request whose cheapest worker has more to do than the next round trip
and step need is held in the gateway: binding it now could not start it sooner, and by then another may be cheaper.
"""

from router import predict
from router.policy import Choice, FleetView, WorkerView
from router.request import Candidate, RoutableRequest

_ROUND_TRIP_S = 0.01
_NEAR = 1.005  # costs this close are equal, and a random one wins: several gateways must not all pick the same worker


class Headrace:
    """Least predicted cost over all pairs and over local service."""

    name = "headrace"

    def choose(self, request: RoutableRequest, view: FleetView) -> Choice:
        options = [predict.local(request, worker) for worker in view.decode]
        options += [
            predict.pair(request, prefill, decode, view)
            for prefill in view.prefill
            for decode in view.decode
            if predict.can_hand_over(prefill, decode) and not request.is_local_only
        ]
        least = min(option.total_s for option in options)
        near = [option for option in options if option.total_s <= least * _NEAR]
        chosen = view.rng.choice(near)
        computing = _computing(chosen, view)
        room_s = _ROUND_TRIP_S + computing.latency.step_s(computing.num_running, computing.kv_tokens)
        if computing.queue_s > room_s:
            return Choice(chosen, tuple(options), True, f"{computing.worker} is busy", room_s)
        return Choice(chosen, tuple(options))


def _computing(candidate: Candidate, view: FleetView) -> WorkerView:
    if candidate.prefill is None:
        return next(worker for worker in view.decode if worker.worker == candidate.decode)
    return next(worker for worker in view.prefill if worker.worker == candidate.prefill)
