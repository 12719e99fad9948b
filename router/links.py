"""How fast KV caches move from worker to worker."""

from planes.wire.messages import LatencyPrior, WorkerId
from router.latency import LinkModel
from router.stats import LinkStatus


class LinkTable:
    """Handover speeds: a model for each pair that has handed over, and one per prefill worker for all other pairs."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[WorkerId, WorkerId], LinkModel] = {}
        self._senders: dict[WorkerId, LinkModel] = {}
        self._priors: dict[WorkerId, LatencyPrior] = {}

    def add(self, worker: WorkerId, prior: LatencyPrior) -> None:
        """A worker came: nothing is known of its links but its own guess."""
        self._priors[worker] = prior
        self._senders[worker] = LinkModel(prior)

    def drop(self, worker: WorkerId) -> None:
        """A worker left. Its links are forgotten, and what its last streams still tell is not kept."""
        self._priors.pop(worker, None)
        self._senders.pop(worker, None)
        for pair in [pair for pair in self._pairs if worker in pair]:
            del self._pairs[pair]

    def link(self, prefill: WorkerId, decode: WorkerId) -> LinkModel:
        model = self._pairs.get((prefill, decode)) or self._senders.get(prefill)
        return model if model is not None else LinkModel(LatencyPrior())

    def learn(self, prefill: WorkerId, decode: WorkerId, num_bytes: int, seconds: float) -> None:
        """Take in a handover between two workers. One that is gone is not remembered."""
        prior = self._priors.get(prefill)
        if prior is None:
            return
        self._senders[prefill].learn(num_bytes, seconds)
        if decode in self._priors:
            pair = self._pairs.get((prefill, decode))
            if pair is None:
                pair = self._pairs[prefill, decode] = LinkModel(prior)
            pair.learn(num_bytes, seconds)

    def sender(self, prefill: WorkerId) -> LinkModel:
        """Of all that a worker gives, to whomever."""
        return self._senders.get(prefill) or LinkModel(LatencyPrior())

    def statuses(self) -> list[LinkStatus]:
        """Every pair that has handed over, in order."""
        return [
            LinkStatus(prefill, decode, model.fixed_s, model.bytes_per_s, model.error_ratio)
            for (prefill, decode), model in sorted(self._pairs.items())
        ]

    def __len__(self) -> int:
        """Pairs that are remembered."""
        return len(self._pairs)

    def error_ratio(self) -> float:
        """Mean over the prefill workers that have handed anything over."""
        errors = [model.error_ratio for model in self._senders.values() if model.error_ratio]
        return sum(errors) / len(errors) if errors else 0.0
