"""NVIDIA Dynamo's KV router: prefill blocks to compute plus blocks in use."""

import math
import random
from collections.abc import Sequence

from router.policies.leg_policy import LegPolicy, least, num_requests
from router.policy import WorkerView
from router.request import RoutableRequest


class Dynamo(LegPolicy):
    """`scale * max(0, (active_prefill_tokens + prompt_tokens) / B - credit) + decode_blocks + w * active_requests`.

    credit: blocks of the prompt that the worker holds (we know of device blocks only, which count in full).
    Decode leg under disaggregation: credit 0 and no prefill tracking, so blocks and requests alone decide.

    Args:  scale, request_weight, temperature: Dynamo's defaults. At temperature 0 the least cost wins, above it a
           softmax over costs scaled to 0..1.  is_conditional: prefill on the decode worker when fewer than
           `max_local_tokens` of the prompt are uncached there and they are less than `max_local_share` of it
           (conditional disaggregation, off by default).

    Source: ai-dynamo/dynamo 1.6, `lib/kv-router` (scheduler and its default selector).
    """

    name = "dynamo"

    def __init__(
        self,
        *,
        scale: float = 1.0,
        request_weight: float = 0.0,
        temperature: float = 0.0,
        is_conditional: bool = False,
        max_local_tokens: int = 2048,
        max_local_share: float = 0.7,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; it must be at least 0")
        self._scale = scale
        self._request_weight = request_weight
        self._temperature = temperature
        self._is_conditional = is_conditional
        self._max_local_tokens = max_local_tokens
        self._max_local_share = max_local_share

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del rng
        costs = []
        for worker in workers:
            uncached = worker.waiting_prefill_tokens + request.prompt_tokens - worker.cached_tokens
            costs.append(self._scale * max(0.0, uncached / worker.facts.block_size) + self._active(worker))
        return costs

    def decode_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        del request, rng
        return [self._active(worker) for worker in workers]

    def keeps_local(self, request: RoutableRequest, decode: WorkerView) -> bool:
        uncached = request.prompt_tokens - decode.cached_tokens
        return (
            self._is_conditional
            and uncached < self._max_local_tokens
            and uncached / request.prompt_tokens < self._max_local_share
        )

    def pick(self, costs: Sequence[float], rng: random.Random) -> int:
        low, high = min(costs), max(costs)
        if not self._temperature or low == high:
            return least(costs, rng)
        weights = [math.exp((low - cost) / (high - low) / self._temperature) for cost in costs]
        return rng.choices(range(len(costs)), weights)[0]

    def _active(self, worker: WorkerView) -> float:
        return worker.kv_tokens / worker.facts.block_size + self._request_weight * num_requests(worker)
