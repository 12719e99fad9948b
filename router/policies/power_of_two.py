"""Power of two choices: of two random workers the one with fewer requests."""

import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy, num_requests
from router.policy import WorkerView
from router.request import RoutableRequest


class PowerOfTwo(LegPolicy):
    """Looks at two workers only. Those not looked at cost more than any that was.

    Source: Mitzenmacher, The power of two choices in randomized load balancing, 2001; `power_of_two` of
    sglang-router and vllm-router, which count requests in flight.
    """

    name = "power_of_two"

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request
        return two_of(workers, range(len(workers)), rng)

    decode_costs = prefill_costs


def two_of(workers: Sequence[WorkerView], eligible: Sequence[int], rng: random.Random) -> list[float]:
    """Costs that make the less loaded of two random `eligible` workers (indices, not empty) win."""
    loads = [float(num_requests(worker)) for worker in workers]
    beyond = max(loads) + 1
    seen = set(rng.sample(eligible, min(2, len(eligible))))
    return [load if index in seen else beyond for index, load in enumerate(loads)]
