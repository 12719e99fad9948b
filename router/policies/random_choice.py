"""Uniformly at random: the baseline that needs no state at all."""

import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy
from router.policy import WorkerView
from router.request import RoutableRequest


class RandomChoice(LegPolicy):
    """Every worker costs the same, and ties are broken at random."""

    name = "random"

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request, rng
        return [0.0] * len(workers)

    decode_costs = prefill_costs
