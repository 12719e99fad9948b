"""A published rule, applied to each leg of a request: who computes the prompt, then who decodes.

The peers' rules give every worker a cost (lower wins, ties uniformly at random). Where they meet our kinds of fleet:

- A worker that can do both and wins the prefill leg serves the request alone; so does the winner among the decode
  workers when a request must stay local or no prefill worker is up.
- Otherwise the decode leg is chosen among all that can decode, by the rule's own cost for that leg.

None of the rules predicts seconds for a whole request, so `Candidate.total_s` holds the rule's cost (both legs added
up) in its own unit and the other cost fields are zero. None holds a request back either.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

from planes.wire.messages import WorkerId
from router.policy import Choice, FleetView, WorkerView
from router.request import Candidate, RoutableRequest


def least(costs: Sequence[float], rng: random.Random) -> int:
    """Index of the least cost; among equals a random one."""
    lowest = min(costs)
    ties = [index for index, cost in enumerate(costs) if cost == lowest]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


def num_requests(worker: WorkerView) -> int:
    """Requests sent there and not finished."""
    return worker.num_running + worker.num_waiting


class LegPolicy(ABC):
    """Base of the peers' rules; a subclass gives the costs."""

    name: str

    @abstractmethod
    def prefill_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        """Cost of computing the prompt on each of `workers` (never empty), which also decode it where they can."""

    @abstractmethod
    def decode_costs(
        self, request: RoutableRequest, workers: Sequence[WorkerView], rng: random.Random
    ) -> Sequence[float]:
        """Cost of decoding on each of `workers` (never empty) what another worker has prefilled."""

    def keeps_local(self, request: RoutableRequest, decode: WorkerView) -> bool:
        """Whether the chosen decode worker had better compute the prompt itself (conditional disaggregation)."""
        del request, decode
        return False

    def pick(self, costs: Sequence[float], rng: random.Random) -> int:
        return least(costs, rng)

    def choose(self, request: RoutableRequest, view: FleetView) -> Choice:
        computing = view.decode if request.is_local_only or not view.prefill else view.prefill
        costs = self.prefill_costs(request, computing, view.rng)
        if request.is_local_only or all(worker.role.can_decode for worker in computing):
            options = tuple(_local(worker, cost) for worker, cost in zip(computing, costs, strict=True))
            return Choice(chosen=options[self.pick(costs, view.rng)], candidates=options)
        return self._choose_pair(request, view, costs)

    def _choose_pair(self, request: RoutableRequest, view: FleetView, prefill_costs: Sequence[float]) -> Choice:
        decode_costs = self.decode_costs(request, view.decode, view.rng)
        decode_index = self.pick(decode_costs, view.rng)
        decode, decode_cost = view.decode[decode_index], decode_costs[decode_index]
        if self.keeps_local(request, decode):
            local = _local(decode, decode_cost)
            return Choice(chosen=local, candidates=(local,))
        prefill_index = self.pick(prefill_costs, view.rng)
        options = [
            _local(worker, cost) if worker.role.can_decode else _pair(worker, decode, cost + decode_cost)
            for worker, cost in zip(view.prefill, prefill_costs, strict=True)
        ]
        chosen = options[prefill_index]
        if chosen.prefill is not None:
            prefill, prefill_cost = view.prefill[prefill_index], prefill_costs[prefill_index]
            options += [
                _pair(prefill, worker, prefill_cost + cost)
                for index, (worker, cost) in enumerate(zip(view.decode, decode_costs, strict=True))
                if index != decode_index
            ]
        return Choice(chosen=chosen, candidates=tuple(options))


def _local(worker: WorkerView, cost: float) -> Candidate:
    return _candidate(None, worker, worker.cached_tokens, cost)


def _pair(prefill: WorkerView, decode: WorkerView, cost: float) -> Candidate:
    return _candidate(prefill.worker, decode, prefill.cached_tokens, cost)


def _candidate(prefill: WorkerId | None, decode: WorkerView, cached_tokens: int, cost: float) -> Candidate:
    return Candidate(
        prefill=prefill,
        decode=decode.worker,
        cached_tokens=cached_tokens,
        decode_cached_tokens=decode.cached_tokens,
        queue_s=0.0,
        prefill_s=0.0,
        handover_s=0.0,
        first_step_s=0.0,
        inflicted_s=0.0,
        total_s=cost,
    )
