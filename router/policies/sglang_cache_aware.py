"""`cache_aware` of sglang-router and vllm-router: longest prefix unless the fleet is out of balance."""

import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy, num_requests
from router.policy import WorkerView
from router.request import RoutableRequest


class SglangCacheAware(LegPolicy):
    """Three cases: out of balance → least loaded; a long match → the longest; else the smallest tree.

    Out of balance: `max - min > balance_abs` and `max > balance_rel * min`, in requests. A match is long when it is
    more than `cache_threshold` of the prompt. The originals keep an approximate tree of the text they routed; we
    give the rule our exact index instead (held blocks for the size of the tree), which can only help it.

    Source: sgl-router `src/policies/cache_aware.rs`, defaults of its command line; the same rule for both legs.
    """

    name = "sglang_cache_aware"

    def __init__(self, *, cache_threshold: float = 0.3, balance_abs: int = 64, balance_rel: float = 1.5) -> None:
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs
        self._balance_rel = balance_rel

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del rng
        loads = [num_requests(worker) for worker in workers]
        low, high = min(loads), max(loads)
        if high - low > self._balance_abs and high > self._balance_rel * low:
            return [float(load) for load in loads]
        if max(worker.cached_tokens for worker in workers) / request.prompt_tokens > self._cache_threshold:
            return [float(-worker.cached_tokens) for worker in workers]
        return [float(worker.num_cached) for worker in workers]

    decode_costs = prefill_costs
