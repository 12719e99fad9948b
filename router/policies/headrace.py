"""Headrace: serve a request in the way that costs everybody the least, in predicted seconds; bind it late.

`router/cost.py` has the cost of one way; there are no weights to set. Conditional disaggregation falls out: a short
or cached prompt costs less where it decodes than a handover would, unless many sequences would have to stand still.

The cheapest of P x D pairs is found in O(P + D): for the cheapest prefill worker take the best decode worker, for that
one the best prefill worker, and so on until nothing changes. Where links are equally fast, and decode workers have no
prompts to compute, that is exact; otherwise the pair found is one that no exchange of a single worker improves.

A request whose cheapest worker has more to do than the next round trip and step need is held in the gateway: binding
it now could not start it sooner, and by the time it can start another worker may be cheaper. Prompts that are computed
in the same step start together, so a short one may come as soon as the next step has a place for it. Held, too, is a
request whose decode worker has no room for it: its KV cache would only wait in the prefill worker's memory.
"""

from collections.abc import Sequence

from router.cost import DecodeCost, PrefillCost, congestion, decode_cost, local, pair, prefill_cost
from router.policy import Choice, FleetView, Links, WorkerView
from router.request import Candidate, RoutableRequest

_ROUND_TRIP_S = 0.01
_PATIENCE = 4  # how many times as long as it took to compute a KV cache may wait for room to decode
_SHARED_STEPS = 16  # prompts are brought together in a step as long as they take at most so many times its fixed cost
_NEAR = 1.003  # costs this close are equal, and a random one wins: several gateways must not all pick the same worker


class Headrace:
    """Least predicted cost over all pairs and over local service."""

    name = "headrace"

    def choose(self, request: RoutableRequest, view: FleetView) -> Choice:
        congested = congestion(view)
        decodes = [decode_cost(request, worker) for worker in view.decode]
        locals_ = [prefill_cost(request, worker, congested) for worker in view.decode]
        options = [local(prefill, decode) for prefill, decode in zip(locals_, decodes, strict=True)]
        if not request.is_local_only:
            known = {leg.worker.worker: leg for leg in locals_}
            prefills = [known.get(worker.worker) or prefill_cost(request, worker, congested) for worker in view.prefill]
            for group in dict.fromkeys([leg.worker.handover for leg in prefills]):
                if group is not None:
                    options += _pairs(
                        request,
                        [leg for leg in prefills if leg.worker.handover == group],
                        [leg for leg in decodes if leg.worker.handover == group],
                        view.links,
                    )
        least = min([option.total_s for option in options])
        near = [option for option in options if option.total_s <= least * _NEAR]
        chosen = near[0] if len(near) == 1 else view.rng.choice(near)
        return _bound_or_held(request, chosen, tuple(options), view, decodes)


def _pairs(
    request: RoutableRequest, prefills: Sequence[PrefillCost], decodes: Sequence[DecodeCost], links: Links
) -> list[Candidate]:
    """The pairs worth weighing: every prefill worker with the best decode worker, and the other way round."""
    if not prefills or not decodes or (len(decodes) == 1 and _is_alone(prefills, decodes[0])):
        return []
    prefill = min(prefills, key=_cost)
    if len(decodes) == 1 and prefill.worker.worker == decodes[0].worker.worker:
        prefill = min([leg for leg in prefills if leg is not prefill], key=_cost)
    best: Candidate | None = None
    weighed: dict[tuple[str | None, str], Candidate] = {}
    decode = decodes[0]
    by_name = {leg.worker.worker: leg for leg in prefills}
    decode_by_name = {leg.worker.worker: leg for leg in decodes}
    while True:
        found = [
            pair(request, prefill, leg, links.link(prefill.worker.worker, leg.worker.worker))
            for leg in decodes
            if leg.worker.worker != prefill.worker.worker
        ]
        decode = decode_by_name[min(found, key=_total).decode]
        found += [
            pair(request, leg, decode, links.link(leg.worker.worker, decode.worker.worker))
            for leg in prefills
            if leg.worker.worker != decode.worker.worker and leg is not prefill
        ]
        weighed.update({(option.prefill, option.decode): option for option in found})
        cheapest = min(found, key=_total)
        if best is not None and cheapest.total_s >= best.total_s:
            return list(weighed.values())
        if cheapest.prefill is None or cheapest.prefill == prefill.worker.worker:
            return list(weighed.values())
        best, prefill = cheapest, by_name[cheapest.prefill]


def _is_alone(prefills: Sequence[PrefillCost], decode: DecodeCost) -> bool:
    return all(leg.worker.worker == decode.worker.worker for leg in prefills)


def _bound_or_held(
    request: RoutableRequest,
    chosen: Candidate,
    options: tuple[Candidate, ...],
    view: FleetView,
    decodes: Sequence[DecodeCost],
) -> Choice:
    decode = next(leg for leg in decodes if leg.worker.worker == chosen.decode)
    computing = decode.worker
    if chosen.prefill is not None:
        computing = next(worker for worker in view.prefill if worker.worker == chosen.prefill)
    max_backlog_s = _max_backlog_s(computing, request.prompt_tokens - computing.cached_tokens)
    if because := computing.busy_because(max_backlog_s):
        return Choice(
            chosen=chosen, candidates=options, is_held=True, held_because=because, max_backlog_s=max_backlog_s
        )
    computing_s = chosen.prefill_s + chosen.handover_s
    if not decode.has_room and decode.decode_s > _PATIENCE * decode.worker.num_running * computing_s:
        because = f"{chosen.decode} has no room to decode"
        return Choice(
            chosen=chosen, candidates=options, is_held=True, held_because=because, max_backlog_s=max_backlog_s
        )
    return Choice(chosen=chosen, candidates=options, max_backlog_s=max_backlog_s)


def _max_backlog_s(worker: WorkerView, uncached_tokens: int) -> float:
    """Prompt work that must lie ready at a worker so that it never idles, a round trip and a step; and what a prompt
    can share a step with, where steps are dear: prompts in one step start together, and end together, too. A long one
    would keep the others: where nobody decodes it waits until they are done. Beside streams they are done in chunks.
    """
    latency = worker.latency
    max_backlog_s = _ROUND_TRIP_S + latency.step_s(worker.num_running, worker.kv_tokens)
    beside = worker.facts.max_step_tokens - uncached_tokens
    if beside <= 0:
        return max_backlog_s
    shared_s = _SHARED_STEPS * latency.prefill_s(0, 0)
    if not worker.role.can_decode:
        shared_s -= latency.prefill_s(uncached_tokens, uncached_tokens)
    return max_backlog_s + max(0.0, min(latency.prefill_s(beside, beside), shared_s))


def _cost(leg: PrefillCost) -> float:
    return leg.cost_s


def _total(option: Candidate) -> float:
    return option.total_s
