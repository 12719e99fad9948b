"""llm-d's inference scheduler: a weighted sum of scorers; decode first, then perhaps a remote prefill."""

import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy
from router.policy import WorkerView
from router.request import RoutableRequest


class Llmd(LegPolicy):
    """`prefix_weight * prefix + queue_weight * queue + kv_weight * kv`, each scorer in 0..1, the highest sum wins.

    prefix: share of the prompt held.  queue: 1 for the shortest waiting queue down to 0 for the longest, 1 if all
    are equal.  kv: free share of the KV cache. The decode half leaves prefix out. The cost is the negated sum.

    The decode worker is chosen first. It computes the prompt itself unless `remote_tokens` or more are uncached
    there, a decision that is blind to every queue.

    Source: llm-d router, its default scheduling profile (3/2/2), `prefix-cache-scorer`, `queue-scorer`,
    `kv-cache-utilization-scorer` and the disaggregation profile handler.
    """

    name = "llmd"

    def __init__(
        self,
        *,
        prefix_weight: float = 3.0,
        queue_weight: float = 2.0,
        kv_weight: float = 2.0,
        remote_tokens: int = 16,
    ) -> None:
        self._prefix_weight = prefix_weight
        self._queue_weight = queue_weight
        self._kv_weight = kv_weight
        self._remote_tokens = remote_tokens

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del rng
        loads = self._load_scores(workers)
        return [
            -self._prefix_weight * worker.cached_tokens / request.prompt_tokens - load
            for worker, load in zip(workers, loads, strict=True)
        ]

    def decode_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request, rng
        return [-load for load in self._load_scores(workers)]

    def keeps_local(self, request: RoutableRequest, decode: WorkerView) -> bool:
        return request.prompt_tokens - decode.cached_tokens < self._remote_tokens

    def _load_scores(self, workers: Sequence[WorkerView]) -> list[float]:
        waiting = [worker.num_waiting for worker in workers]
        longest, spread = max(waiting), max(waiting) - min(waiting)
        return [
            self._queue_weight * ((longest - worker.num_waiting) / spread if spread else 1.0)
            + self._kv_weight * worker.free_blocks / worker.facts.num_blocks
            for worker in workers
        ]
