"""Round robin: the next worker in the order of their names, each leg with a turn of its own."""

import random
from collections.abc import Sequence

from planes.wire.messages import WorkerId
from router.policies.leg_policy import LegPolicy
from router.policy import WorkerView
from router.request import RoutableRequest


class RoundRobin(LegPolicy):
    """Takes turns; remembers the last worker of each leg, so a fleet that changes does not upset the order.

    Source: the default of Dynamo's frontend (`--router-mode round-robin`) and of most load balancers.
    """

    name = "round_robin"

    def __init__(self) -> None:
        self._last: dict[str, WorkerId] = {}  # by leg, so two entries at most

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request, rng
        return self._turn("prefill", workers)

    def decode_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request, rng
        return self._turn("decode", workers)

    def _turn(self, leg: str, workers: Sequence[WorkerView]) -> Sequence[float]:
        last = self._last.get(leg)
        names = [worker.worker for worker in workers]
        chosen = min((name for name in names if last is None or name > last), default=min(names))
        self._last[leg] = chosen
        return [0.0 if name == chosen else 1.0 for name in names]
