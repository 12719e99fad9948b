"""Mooncake's Conductor: the least predicted time to first token, then the least predicted time between tokens."""

import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy
from router.policy import WorkerView
from router.request import RoutableRequest


class Mooncake(LegPolicy):
    """Prefill leg: least `T_queue + T_prefill(uncached)`. Decode leg: least step time with this request on board.

    Both in seconds, from the latency model that the router has learned. Algorithm 1 also weighs fetching the prefix
    from the worker that holds most of it; a route has no third participant yet, so that branch is left out. Its early
    rejection is the router's (`slo_ttft_s`).

    Source: Qin et al., Mooncake: Trading more storage for less computation, FAST 2025, algorithm 1.
    """

    name = "mooncake"

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del rng
        return [
            worker.queue_s
            + worker.shared_s
            + worker.latency.prefill_s(request.prompt_tokens - worker.cached_tokens, request.prompt_tokens)
            for worker in workers
        ]

    def decode_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del rng
        return [
            worker.latency.step_s(worker.num_running + worker.num_waiting + 1, worker.kv_tokens + request.prompt_tokens)
            for worker in workers
        ]
