"""Least loaded: fewest prompt tokens to compute, fewest requests to decode. The strongest rule that ignores caches."""

import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy, num_requests
from router.policy import WorkerView
from router.request import RoutableRequest


class LeastLoaded(LegPolicy):
    """Prefill leg: prompt tokens accepted and not computed yet. Decode leg: requests there.

    A worker that does both is judged by its prompt tokens, and by its requests where those are equal.

    Source: "least work" in our first simulation of the prefill side; join the shortest queue.
    """

    name = "least_loaded"

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request, rng
        # Requests weigh less than one token all together: they only break ties.
        return [worker.waiting_prefill_tokens + num_requests(worker) / 2**20 for worker in workers]

    def decode_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request, rng
        return [float(num_requests(worker)) for worker in workers]
