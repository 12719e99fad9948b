"""Headrace: serve a request in the way that gives up least and then costs everybody the least, in predicted seconds;
bind it late.

`router/cost.py` has the cost of one way; there are no weights to set. Conditional disaggregation falls out: a short
or cached prompt costs less where it decodes than a handover would, unless streams would have to stand still.

The cheapest of P x D pairs is found in O(P + D): for the cheapest prefill worker take the best decode worker, for that
one the best prefill worker, and so on until nothing changes; then the same from the best single worker on. Where links
are equally fast, and decode workers have no prompts to compute, that is exact; otherwise what is found is a way that no
exchange of a single worker improves.

A request is held in the gateway as long as its worker's next step with a place for it is further away than a round trip
and a decode step: binding it now could not start it sooner, and by the time it can start another worker may be cheaper.
It joins the prompts of that step unless they would lose more by it than a step of its own costs those who wait. Held,
too, is a request whose decode worker has no room for it: its KV cache would only wait in the prefill worker's memory.
"""

from collections.abc import Sequence
from operator import attrgetter

from planes.wire.messages import WorkerId
from router.cost import DecodeCost, PrefillCost, decode_cost, local, pair, prefill_cost
from router.policy import Choice, FleetView, Links, WorkerView
from router.prices import MEASURED, CostModel, Goals, congestion
from router.request import Candidate, RoutableRequest


class Headrace:
    """Least predicted cost over all pairs and over local service."""

    name = "headrace"

    def __init__(self, model: CostModel = MEASURED) -> None:
        self.model = model

    def choose(self, request: RoutableRequest, view: FleetView) -> Choice:
        model, congested, goals = self.model, congestion(view), Goals.of(request, view)
        decodes = [decode_cost(request, worker, model) for worker in view.decode]
        locals_ = [prefill_cost(request, worker, congested, model) for worker in view.decode]
        options = [
            local(request, prefill, decode, goals, model) for prefill, decode in zip(locals_, decodes, strict=True)
        ]
        if not request.is_local_only:
            known = {leg.worker.worker: leg for leg in locals_}
            prefills = [
                known.get(worker.worker) or prefill_cost(request, worker, congested, model) for worker in view.prefill
            ]
            for group in dict.fromkeys([leg.worker.handover for leg in prefills]):
                if group is not None:
                    senders = [leg for leg in prefills if leg.worker.handover == group]
                    receivers = [leg for leg in decodes if leg.worker.handover == group]
                    nearest = min(options[: len(decodes)], key=_order).decode
                    options += _Pairs(request, senders, receivers, view.links, goals, model).weighed(nearest)
        best = min(options, key=_order)
        most_s, given_up = best.total_s * model.near, best.gives_up
        near = [option for option in options if option.gives_up is given_up and option.total_s <= most_s]
        if len(near) > 1:  # workers that do both need no handover that gains nothing
            both = {worker.worker for worker in view.prefill}
            near = [option for option in near if option.prefill is None and option.decode in both] or near
        chosen = near[0] if len(near) == 1 else view.rng.choice(near)
        return _bound_or_held(request, chosen, tuple(options), view, model)


class _Pairs:
    """The pairs of one handover group that are worth weighing, each weighed once."""

    def __init__(
        self,
        request: RoutableRequest,
        prefills: Sequence[PrefillCost],
        decodes: Sequence[DecodeCost],
        links: Links,
        goals: Goals,
        model: CostModel,
    ) -> None:
        self._request, self._links, self._goals, self._model = request, links, goals, model
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
            prefill = self._prefills.get(better.prefill) if better.order_s < best.order_s else None

    def _cheapest(self) -> PrefillCost | None:
        """The prefill worker that costs least of those with another worker to hand over to."""
        able = [leg for name, leg in self._prefills.items() if len(self._decodes) > (name in self._decodes)]
        return min(able, key=_cost, default=None)

    def _best_decode(self, prefill: PrefillCost) -> Candidate:
        name = prefill.worker.worker
        return min([self._pair(prefill, leg) for other, leg in self._decodes.items() if other != name], key=_order)

    def _best_prefill(self, decode: DecodeCost) -> Candidate:
        name = decode.worker.worker
        return min([self._pair(leg, decode) for other, leg in self._prefills.items() if other != name], key=_order)

    def _pair(self, prefill: PrefillCost, decode: DecodeCost) -> Candidate:
        names = prefill.worker.worker, decode.worker.worker
        found = self._found.get(names)
        if found is None:
            found = self._found[names] = pair(
                self._request, prefill, decode, self._links.link(*names), self._goals, self._model
            )
        return found


_cost, _order = attrgetter("cost_s"), attrgetter("order_s")


def _bound_or_held(
    request: RoutableRequest,
    chosen: Candidate,
    options: tuple[Candidate, ...],
    view: FleetView,
    model: CostModel,
) -> Choice:
    name, workers = (chosen.decode, view.decode) if chosen.prefill is None else (chosen.prefill, view.prefill)
    computing = next(worker for worker in workers if worker.worker == name)
    max_backlog_s = model.round_trip_s + computing.latency.step_s(computing.num_streams, computing.kv_tokens)
    because, lacks_room = computing.busy_because(max_backlog_s) or _shares_badly(request, computing, view), False
    if not because and chosen.waits_for_room:
        because, lacks_room = f"{chosen.decode} has no room to decode", True
    return Choice(
        chosen=chosen,
        candidates=options,
        is_held=bool(because),
        held_because=because,
        max_backlog_s=max_backlog_s,
        lacks_room=lacks_room,
    )


def _shares_badly(request: RoutableRequest, worker: WorkerView, view: FleetView) -> str:
    """Why the step that begins next should begin without it; empty: it should not.

    In that step it keeps those that are in it for as long as its work there takes. In a step of its own it costs
    everybody who waits, itself first, what a step costs beside the work.
    """
    if not worker.num_sharing or worker.num_passed:
        return ""
    uncached = request.prompt_tokens - worker.cached_tokens
    free = worker.facts.max_step_tokens - worker.num_streams - worker.shared_tokens
    longer_s = worker.latency.work_s(uncached, request.prompt_tokens) * min(1.0, free / uncached)
    num_waiting = max(1.0, view.num_waiting / max(1, len(view.prefill) or len(view.decode)))
    saved_s = worker.latency.fixed_s(worker.num_streams, worker.kv_tokens)
    if worker.num_sharing * longer_s <= num_waiting * saved_s:
        return ""
    return f"{worker.worker} begins a step that {worker.num_sharing} prompts would wait {longer_s:.2f} s longer for"
