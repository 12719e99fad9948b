"""llm-d's predicted-latency scheduling: the worker whose predicted latency is least, one model of a worker for all."""

import random
from collections.abc import Sequence
from typing import Final

from router.policies.leg_policy import LegPolicy
from router.policy import WorkerView
from router.request import RoutableRequest

_MOST: Final = 1.0
"""The highest cost of a worker that is looked at; the others cost more."""


class LlmdPredicted(LegPolicy):
    """`ttft_weight * ttft + tpot_weight * tpot`, predicted, each scaled to 0..1 over the workers: its way without SLOs.

    Affinity: where workers hold `affinity` of the prompt, only they are looked at, unless the fastest of them takes
    `max_penalty_s` longer to the first token than the fastest of all, and but for a share `explore` of requests. The
    pick is random: the best weighs a hundred times as much as the worst.

    It does not know of disaggregation: both legs are judged as if the worker served the request alone. The decode
    worker is chosen first, as in `llmd`, and computes the prompt itself unless `remote_tokens` or more are uncached.
    llm-d learns a regression of latency on load, lengths and cached share, the same for all; here its predictions come
    from what the router has learned of each worker, which can only be nearer.

    Source: llm-d router, its latency predictor, latency scorer and weighted random picker, with their defaults.
    """

    name = "llmd_predicted"

    def __init__(
        self,
        *,
        ttft_weight: float = 0.8,
        tpot_weight: float = 0.2,
        affinity: float = 0.8,
        max_penalty_s: float = 5.0,
        explore: float = 0.01,
        remote_tokens: int = 16,
    ) -> None:
        self._ttft_weight = ttft_weight
        self._tpot_weight = tpot_weight
        self._affinity = affinity
        self._max_penalty_s = max_penalty_s
        self._explore = explore
        self._remote_tokens = remote_tokens

    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        ttfts = [_ttft_s(request, worker) for worker in workers]
        tpots = [_tpot_s(request, worker) for worker in workers]
        near = self._near(request, workers, ttfts, rng)
        ttft_shares, tpot_shares = _shares(ttfts, near), _shares(tpots, near)
        costs = [2 * _MOST] * len(workers)
        for index, ttft, tpot in zip(near, ttft_shares, tpot_shares, strict=True):
            costs[index] = (self._ttft_weight * ttft + self._tpot_weight * tpot) / (
                self._ttft_weight + self._tpot_weight
            )
        return costs

    decode_costs = prefill_costs

    def keeps_local(self, request: RoutableRequest, decode: WorkerView) -> bool:
        return request.prompt_tokens - decode.cached_tokens < self._remote_tokens

    def pick(self, costs: Sequence[float], rng: random.Random) -> int:
        weights = [1 + 99 * (_MOST - cost) if cost <= _MOST else 0.0 for cost in costs]
        return rng.choices(range(len(costs)), weights)[0]

    def _near(
        self, request: RoutableRequest, workers: Sequence[WorkerView], ttfts: Sequence[float], rng: random.Random
    ) -> Sequence[int]:
        """Indices of the workers that are looked at."""
        everybody = range(len(workers))
        near = [i for i in everybody if workers[i].cached_tokens >= self._affinity * request.prompt_tokens]
        if not near or rng.random() < self._explore:
            return everybody
        return near if min(ttfts[i] for i in near) - min(ttfts) <= self._max_penalty_s else everybody


def _ttft_s(request: RoutableRequest, worker: WorkerView) -> float:
    uncached_tokens = request.prompt_tokens - worker.cached_tokens
    return worker.queue_s + worker.latency.prefill_s(uncached_tokens, request.prompt_tokens)


def _tpot_s(request: RoutableRequest, worker: WorkerView) -> float:
    batch = worker.num_running + worker.num_waiting + 1
    return worker.latency.step_s(batch, worker.kv_tokens + request.prompt_tokens)


def _shares(seconds: Sequence[float], near: Sequence[int]) -> list[float]:
    """Of those in `near`: 0 for the least, 1 for the most, 0 for all where they are equal."""
    low, high = min(seconds[i] for i in near), max(seconds[i] for i in near)
    return [(seconds[i] - low) / (high - low) if high > low else 0.0 for i in near]
