"""Infera's KV-aware rule: weighted missing blocks plus blocks in use."""

import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy
from router.policy import WorkerView
from router.request import RoutableRequest


class Infera(LegPolicy):
    """`w * (request_blocks - hits) + active_blocks`, w = 20 on the prefill leg and 2 on the decode leg.

    Infera counts distinct active blocks; we know tokens: those waiting to be computed and those being decoded.

    Source: AMD-AGI Infera, its scheduler's KV-aware cost.
    """

    name = "infera"

    def __init__(self, *, prefill_weight: float = 20.0, decode_weight: float = 2.0) -> None:
        self._prefill_weight = prefill_weight
        self._decode_weight = decode_weight

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del rng
        return [_cost(self._prefill_weight, request, worker) for worker in workers]

    def decode_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del rng
        return [_cost(self._decode_weight, request, worker) for worker in workers]


def _cost(weight: float, request: RoutableRequest, worker: WorkerView) -> float:
    missing_tokens = request.prompt_tokens - worker.cached_tokens
    return (weight * missing_tokens + worker.waiting_prefill_tokens + worker.kv_tokens) / worker.facts.block_size
