"""AIBrix's prefix-cache router: best match among the workers that are not overloaded."""

import random
import statistics
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy, num_requests
from router.policy import WorkerView
from router.request import RoutableRequest


class Aibrix(LegPolicy):
    """Load gate first; then the best match among workers within `sigmas` standard deviations of the mean load.

    Gate: `max > 2 * (mean + 1)` and `max - min >= imbalance` requests → least requests. Otherwise among workers with at
    most `mean + sigmas * sigma` requests the longest match, and of equal matches the fewest requests (also when
    nobody holds anything). The decode leg takes the fewest requests: AIBrix's prefix router does not look there.

    Source: AIBrix `pkg/plugins/gateway/algorithms/prefix_cache.go`.
    """

    name = "aibrix"

    def __init__(self, *, imbalance: int = 8, sigmas: float = 1.0) -> None:
        self._imbalance = imbalance
        self._sigmas = sigmas

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        loads = [num_requests(worker) for worker in workers]
        low, high, mean = min(loads), max(loads), statistics.fmean(loads)
        if high > 2 * (mean + 1) and high - low >= self._imbalance:
            return self.decode_costs(request, workers, rng)
        limit = mean + self._sigmas * statistics.pstdev(loads)
        # A token of match outweighs every request; a worker beyond the limit loses against all that are within it.
        beyond = request.prompt_tokens + 1
        return [
            (0 if load <= limit else beyond) - worker.cached_tokens + load / 2**20
            for worker, load in zip(workers, loads, strict=True)
        ]

    def decode_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request, rng
        return [float(num_requests(worker)) for worker in workers]
