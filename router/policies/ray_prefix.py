"""Ray Serve's prefix-aware router: longest match while the queues are even, else power of two."""

import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy, num_requests
from router.policies.power_of_two import two_of
from router.policy import WorkerView
from router.request import RoutableRequest


class RayPrefix(LegPolicy):
    """Power of two choices among those that the prefix rule leaves over.

    Queues even (`max - min < imbalanced_threshold`, in requests): the workers with the longest match if it is at least
    `match_threshold` of the prompt, else those that hold least. Queues uneven: all workers. Ray's tree is of text;
    ours is the exact index, and held blocks stand for its size.

    Source: Ray Serve LLM, `PrefixCacheAffinityRouter`; the same rule for both legs.
    """

    name = "ray_prefix"

    def __init__(self, *, imbalanced_threshold: int = 10, match_threshold: float = 0.1) -> None:
        self._imbalanced_threshold = imbalanced_threshold
        self._match_threshold = match_threshold

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        return two_of(workers, self._eligible(request, workers), rng)

    decode_costs = prefill_costs

    def _eligible(self, request: RoutableRequest, workers: Sequence[WorkerView]) -> list[int]:
        loads = [num_requests(worker) for worker in workers]
        if max(loads) - min(loads) >= self._imbalanced_threshold:
            return list(range(len(workers)))
        longest = max(worker.cached_tokens for worker in workers)
        if longest / request.prompt_tokens >= self._match_threshold:
            return [index for index, worker in enumerate(workers) if worker.cached_tokens == longest]
        smallest = min(worker.num_cached for worker in workers)
        return [index for index, worker in enumerate(workers) if worker.num_cached == smallest]
