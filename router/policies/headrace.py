"""Headrace: serve a request in the way that costs everybody the least, in predicted seconds; bind it late.

`router/cost.py` has the cost of one way; there are no weights to set. Conditional disaggregation falls out: a short
or cached prompt costs less where it decodes than a handover would, unless many sequences would have to stand still.

The cheapest of P x D pairs is found in O(P + D): for the cheapest prefill worker take the best decode worker, for that
one the best prefill worker, and so on until nothing changes; then the same from the best single worker on. Where links
are equally fast, and decode workers have no prompts to compute, that is exact; otherwise what is found is a way that no
exchange of a single worker improves.

A request whose cheapest worker has more to do than the next round trip and step need is held in the gateway: binding
it now could not start it sooner, and by the time it can start another worker may be cheaper. Prompts that are computed
in the same step start together, so a short one may come as soon as the next step has a place for it. Held, too, is a
request whose decode worker has no room for it: its KV cache would only wait in the prefill worker's memory.
"""

from collections.abc import Sequence
from operator import attrgetter

from planes.wire.messages import WorkerId
from router.cost import MEASURED, CostModel, DecodeCost, PrefillCost, congestion, decode_cost, local, pair, prefill_cost
from router.policy import Choice, FleetView, Links, WorkerView
from router.request import Candidate, RoutableRequest


class Headrace:
    """Least predicted cost over all pairs and over local service."""

    name = "headrace"

    def __init__(self, model: CostModel = MEASURED) -> None:
        self.model = model

    def choose(self, request: RoutableRequest, view: FleetView) -> Choice:
        model, congested = self.model, congestion(view)
        decodes = [decode_cost(request, worker, model) for worker in view.decode]
        locals_ = [prefill_cost(request, worker, congested, model) for worker in view.decode]
        options = [local(prefill, decode) for prefill, decode in zip(locals_, decodes, strict=True)]
        if not request.is_local_only:
            known = {leg.worker.worker: leg for leg in locals_}
            prefills = [
                known.get(worker.worker) or prefill_cost(request, worker, congested, model) for worker in view.prefill
            ]
            for group in dict.fromkeys([leg.worker.handover for leg in prefills]):
                if group is not None:
                    senders = [leg for leg in prefills if leg.worker.handover == group]
                    receivers = [leg for leg in decodes if leg.worker.handover == group]
                    nearest = min(options[: len(decodes)], key=_total).decode
                    options += _Pairs(request, senders, receivers, view.links, model).weighed(nearest)
        least = min([option.total_s for option in options])
        near = [option for option in options if option.total_s <= least * model.near]
        chosen = near[0] if len(near) == 1 else view.rng.choice(near)
        return _bound_or_held(request, chosen, tuple(options), view, decodes, model)


class _Pairs:
    """The pairs of one handover group that are worth weighing, each weighed once."""

    def __init__(
        self,
        request: RoutableRequest,
        prefills: Sequence[PrefillCost],
        decodes: Sequence[DecodeCost],
        links: Links,
        model: CostModel,
    ) -> None:
        self._request, self._links, self._model = request, links, model
        self._prefills: dict[WorkerId | None, PrefillCost] = {leg.worker.worker: leg for leg in prefills}
        self._decodes = {leg.worker.worker: leg for leg in decodes}
        self._found: dict[tuple[WorkerId, WorkerId], Candidate] = {}

    def weighed(self, nearest: WorkerId) -> list[Candidate]:
        """The cheapest prefill worker with its best decode worker, that one with its best prefill worker, and so on
        until that is no cheaper; and the same from the worker that serves alone for least, `nearest`, on.
        """
        self._improve(self._cheapest())
        if self._found and nearest in self._decodes and len(self._prefills) > (nearest in self._prefills):
            self._improve(self._prefills[self._best_prefill(self._decodes[nearest]).prefill])
        return list(self._found.values())

    def _improve(self, prefill: PrefillCost | None) -> None:
        while prefill is not None:
            best = self._best_decode(prefill)
            better = self._best_prefill(self._decodes[best.decode])
            prefill = self._prefills.get(better.prefill) if better.total_s < best.total_s else None

    def _cheapest(self) -> PrefillCost | None:
        """The prefill worker that costs least of those with another worker to hand over to."""
        able = [leg for name, leg in self._prefills.items() if len(self._decodes) > (name in self._decodes)]
        return min(able, key=_cost, default=None)

    def _best_decode(self, prefill: PrefillCost) -> Candidate:
        name = prefill.worker.worker
        return min([self._pair(prefill, leg) for other, leg in self._decodes.items() if other != name], key=_total)

    def _best_prefill(self, decode: DecodeCost) -> Candidate:
        name = decode.worker.worker
        return min([self._pair(leg, decode) for other, leg in self._prefills.items() if other != name], key=_total)

    def _pair(self, prefill: PrefillCost, decode: DecodeCost) -> Candidate:
        names = prefill.worker.worker, decode.worker.worker
        found = self._found.get(names)
        if found is None:
            found = self._found[names] = pair(self._request, prefill, decode, self._links.link(*names), self._model)
        return found


_cost, _total = attrgetter("cost_s"), attrgetter("total_s")


def _bound_or_held(
    request: RoutableRequest,
    chosen: Candidate,
    options: tuple[Candidate, ...],
    view: FleetView,
    decodes: Sequence[DecodeCost],
    model: CostModel,
) -> Choice:
    decode = next(leg for leg in decodes if leg.worker.worker == chosen.decode)
    computing = decode.worker
    if chosen.prefill is not None:
        computing = next(worker for worker in view.prefill if worker.worker == chosen.prefill)
    max_backlog_s = _max_backlog_s(computing, request.prompt_tokens - computing.cached_tokens, model)
    if because := computing.busy_because(max_backlog_s):
        return Choice(
            chosen=chosen, candidates=options, is_held=True, held_because=because, max_backlog_s=max_backlog_s
        )
    computing_s = chosen.prefill_s + chosen.handover_s
    if not decode.has_room and decode.decode_s > model.patience * decode.worker.num_running * computing_s:
        because = f"{chosen.decode} has no room to decode"
        return Choice(
            chosen=chosen, candidates=options, is_held=True, held_because=because, max_backlog_s=max_backlog_s
        )
    return Choice(chosen=chosen, candidates=options, max_backlog_s=max_backlog_s)


def _max_backlog_s(worker: WorkerView, uncached_tokens: int, model: CostModel) -> float:
    """Prompt work that must lie ready at a worker so that it never idles, a round trip and a step; and what a prompt
    can share a step with, where steps are dear: prompts in one step start together, and end together, too. A long one
    would keep the others: where nobody decodes it waits until they are done. Beside streams they are done in chunks.
    """
    latency = worker.latency
    max_backlog_s = model.round_trip_s + latency.step_s(worker.num_running, worker.kv_tokens)
    beside = worker.facts.max_step_tokens - uncached_tokens
    if beside <= 0:
        return max_backlog_s
    shared_s = model.shared_steps * latency.prefill_s(0, 0)
    if not worker.role.can_decode:
        shared_s -= latency.prefill_s(uncached_tokens, uncached_tokens)
    return max_backlog_s + max(0.0, min(latency.prefill_s(beside, beside), shared_s))
