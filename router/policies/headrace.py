"""Headrace: serve a request in the way that gives up least and then costs everybody the least, in predicted seconds;
bind it late.

`router/cost.py` has the cost of one way; there are no weights to set. Conditional disaggregation falls out: a short
or cached prompt costs less where it decodes than a handover would, unless streams would have to stand still.

The cheapest of P x D pairs is found in O(P + D): for the cheapest prefill worker take the best decode worker, for that
one the best prefill worker, and so on until nothing changes; then the same from the best single worker on. Where links
are equally fast, and decode workers have no prompts to compute, that is exact; otherwise what is found is a way that no
exchange of a single worker improves. Where all workers do both, no pairs are weighed that cannot be cheaper.

A request is held in the gateway as long as its worker's next step with a place for it is further away than a round trip
and a decode step, and the time that it takes to send as many of those who wait as that step has places for: binding it
now could not start it sooner, and by the time it can start another worker may be cheaper.
It joins the prompts of that step unless they would lose more by it than a step of its own costs those who wait. Held,
too, is a request for which a worker has no room: where that is its decode worker, its KV cache would only wait in the
prefill worker's memory. And one that would cost a stream its SLO wherever it is computed, while its own first token has
time.
"""

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Final

from planes.wire.messages import WorkerId
from router.cost import DecodeCost, PrefillCost, Way, decode_cost, local, pair, prefill_cost
from router.decision_log import worth_keeping
from router.policy import Choice, FleetView, HandoverGroup, Links, WorkerView
from router.prices import MEASURED, CostModel, Goals, congestion
from router.request import Candidate, HandoverPreference, RoutableRequest, Sacrifice

_ALWAYS: Final = HandoverPreference.ALWAYS  # bound once, see CONTRIBUTING.md
_AUTO: Final = HandoverPreference.AUTO
_NOTHING: Final = Sacrifice.NOTHING
_AN_SLO: Final = (Sacrifice.ITL, Sacrifice.ITL_AND_TTFT)


class Headrace:
    """Least predicted cost over all pairs and over local service."""

    name = "headrace"

    def __init__(self, model: CostModel = MEASURED) -> None:
        self.model = model

    def choose(self, request: RoutableRequest, view: FleetView) -> Choice:
        model, congested, goals = self.model, congestion(view), Goals.of(request, view)
        decodes = [decode_cost(request, worker, model) for worker in view.decode]
        locals_ = [prefill_cost(request, worker, congested, model) for worker in view.decode]
        alone = [local(request, *legs, goals, model) for legs in zip(locals_, decodes, strict=True)]
        pairs = _Pairs(request, view.links, goals, model)
        if view.prefill and not request.is_local_only:
            known = {leg.name: leg for leg in locals_ if leg.worker.role.can_prefill}
            prefills = [
                known.get(worker.worker) or prefill_cost(request, worker, congested, model) for worker in view.prefill
            ]
            best = _best(alone)
            is_free = request.handover is _AUTO and len(known) == len(prefills)
            if not (is_free and _beats_pairs(best, known, prefills, decodes, model)):
                pairs.weigh(prefills, decodes, best.decode)
        chosen, ways = _one_of_the_best(alone, pairs, view, model)
        return _bound_or_held(request, chosen, ways, view, model)


def _beats_pairs(
    alone: Way,
    both: Mapping[WorkerId, PrefillCost],
    prefills: Sequence[PrefillCost],
    decodes: Sequence[DecodeCost],
    model: CostModel,
) -> bool:
    """Whether no pair can be cheaper than a worker of `both` that serves alone: the handover and the step after it,
    which at best cost nothing, left out.
    """
    if alone.decode.name not in both or alone.gives_up is not _NOTHING:
        return False
    least_s = min([leg.cost_s for leg in prefills]) + min([leg.cost_s - leg.gap_s for leg in decodes])
    return alone.total_s <= least_s * model.near


def _one_of_the_best(alone: list[Way], pairs: "_Pairs", view: FleetView, model: CostModel) -> tuple[Way, list[Way]]:
    """Any of those that are as good as the best, and all that were weighed. A pair as good as another one may lie
    beside a better one, by a faster link, which the other does not.
    """
    is_first = True
    while True:
        ways = alone + pairs.found
        best = _best(ways)
        most_s, given_up = best.total_s * model.near, best.gives_up
        near = [way for way in ways if way.total_s <= most_s and way.gives_up is given_up]
        if len(near) > 1:  # workers that do both need no handover that gains nothing
            both = {worker.worker for worker in view.prefill}
            near = [way for way in near if way.is_local and way.decode.name in both] or near
        chosen = near[0] if len(near) == 1 else view.rng.choice(near)
        if is_first and chosen is best:  # the search has looked around it
            return chosen, ways
        if not pairs.weigh_around(chosen) or pairs.least_s() >= best.order_s:
            return chosen, alone + pairs.found
        is_first = False


class _Pairs:
    """The pairs that are worth weighing, each weighed once."""

    def __init__(self, request: RoutableRequest, links: Links, goals: Goals, model: CostModel) -> None:
        self._request, self._links, self._goals, self._model = request, links, goals, model
        self.found: list[Way] = []
        self._known: dict[tuple[WorkerId, WorkerId], Way] = {}
        self._groups: dict[HandoverGroup, tuple[list[PrefillCost], list[DecodeCost]]] = {}

    def weigh(self, prefills: Sequence[PrefillCost], decodes: Sequence[DecodeCost], nearest: DecodeCost) -> None:
        """Of each handover group: the cheapest prefill worker with its best decode worker, that one with its best
        prefill worker, and so on until that is no cheaper; and the same from the worker that serves alone for least,
        `nearest`, on.
        """
        groups = self._groups
        for sender in prefills:
            if sender.worker.handover is not None:
                groups.setdefault(sender.worker.handover, ([], []))[0].append(sender)
        for receiver in decodes:
            group = groups.get(receiver.worker.handover) if receiver.worker.handover is not None else None
            if group is not None:
                group[1].append(receiver)
        for senders, receivers in groups.values():
            if len(senders) == 1 == len(receivers):
                if senders[0].name != receivers[0].name:
                    self._pair(senders[0], receivers[0])
                continue
            self._improve(senders, receivers, nearest)

    def weigh_around(self, pair: Way) -> bool:
        """All that exchange one worker of `pair`.  Returns whether any of them had not been weighed."""
        before = len(self.found)
        if not pair.is_local:
            for senders, receivers in self._groups.values():
                if pair.prefill in senders:
                    self._best_decode(pair.prefill, receivers)
                    self._best_prefill(pair.decode, senders)
        return len(self.found) > before

    def least_s(self) -> float:
        return min([way.order_s for way in self.found])

    def _improve(self, senders: Sequence[PrefillCost], receivers: Sequence[DecodeCost], nearest: DecodeCost) -> None:
        only = receivers[0].name if len(receivers) == 1 else None
        able = [leg for leg in senders if leg.name != only]
        if not able:  # there is nobody to hand over to
            return
        seen = self._descend(self._best_decode(min(able, key=_cost), receivers), senders, receivers)
        if nearest in receivers and nearest.name not in seen:
            first = self._best_prefill(nearest, senders)
            if first is not None:
                self._descend(self._best_decode(first.prefill, receivers), senders, receivers)

    def _descend(
        self, best: Way | None, senders: Sequence[PrefillCost], receivers: Sequence[DecodeCost]
    ) -> set[WorkerId]:
        """Exchange workers until that is no cheaper.  Returns the decode workers whose best partner was found."""
        seen: set[WorkerId] = set()
        while best is not None and best.decode.name not in seen:
            seen.add(best.decode.name)
            better = self._best_prefill(best.decode, senders)
            if better is None or not better.order_s < best.order_s:
                break
            best = self._best_decode(better.prefill, receivers)
        return seen

    def _best_decode(self, sender: PrefillCost, receivers: Sequence[DecodeCost]) -> Way | None:
        pairs = [self._pair(sender, leg) for leg in receivers if leg.name != sender.name]
        return _best(pairs) if pairs else None

    def _best_prefill(self, receiver: DecodeCost, senders: Sequence[PrefillCost]) -> Way | None:
        pairs = [self._pair(leg, receiver) for leg in senders if leg.name != receiver.name]
        return _best(pairs) if pairs else None

    def _pair(self, sender: PrefillCost, receiver: DecodeCost) -> Way:
        names = sender.name, receiver.name
        found = self._known.get(names)
        if found is None:
            link = self._links.link(sender.name, receiver.name)
            found = self._known[names] = pair(self._request, sender, receiver, link, self._goals, self._model)
            self.found.append(found)
        return found


def _best(ways: Sequence[Way]) -> Way:
    """Of those that cost as much the first."""
    best = ways[0]
    for way in ways:
        if way.order_s < best.order_s:
            best = way
    return best


_cost = attrgetter("cost_s")


def _bound_or_held(request: RoutableRequest, way: Way, ways: list[Way], view: FleetView, model: CostModel) -> Choice:
    chosen, computing = way.candidate(), way.prefill.worker
    max_backlog_s = model.round_trip_s + computing.latency.step_s(computing.num_streams, computing.kv_tokens)
    max_backlog_s += model.sending_s * _num_to_send(request, computing, view)
    because = computing.busy_because(max_backlog_s) or _shares_badly(request, way.prefill, view)
    lacks_room = False
    if not because and chosen.waits_for_room:
        because, lacks_room = f"{chosen.waits_for_room} has no room for it", True
    spares_streams = (
        not because
        and _costs_an_slo(chosen)
        and (view.lets_pass or _has_time(request, chosen, view, max_backlog_s, model))
    )
    if spares_streams:
        because = f"a stream on {way.prefill.name} would miss its time between tokens"
    if not because and request.handover is not _ALWAYS:  # else somebody looks at all of them
        cheapest = worth_keeping(ways)
        ways = list(cheapest if way in cheapest else (*cheapest, way))
    return Choice(
        chosen=chosen,
        candidates=tuple([chosen if each is way else each.candidate() for each in ways]),
        is_held=bool(because),
        held_because=because,
        max_backlog_s=max_backlog_s,
        lacks_room=lacks_room,
        spares_streams=spares_streams,
        makes_way_because="" if because else _makes_way_because(request, way, chosen, view),
    )


def _costs_an_slo(chosen: Candidate) -> bool:
    """Whether a stream on the worker that computes the prompt would lose its SLO, and as it is chosen, one anywhere."""
    return chosen.gives_up in _AN_SLO and chosen.strains


def _has_time(request: RoutableRequest, chosen: Candidate, view: FleetView, margin_s: float, model: CostModel) -> bool:
    """Whether it would still be in time if it began `margin_s` later."""
    ttft_s = request.slo_ttft_s
    return ttft_s is not None and view.waited_s + chosen.ttft_s + margin_s < model.sparing_share * ttft_s


def _num_to_send(request: RoutableRequest, worker: WorkerView, view: FleetView) -> float:
    """Of those that wait, as many as one step of `worker` takes, were they all like this one."""
    uncached = request.prompt_tokens - worker.cached_tokens
    fitting = (worker.facts.max_step_tokens - worker.num_streams) / uncached
    return max(0.0, min(fitting, (view.num_waiting - 1) / view.num_computing))


def _makes_way_because(request: RoutableRequest, way: Way, chosen: Candidate, view: FleetView) -> str:
    """Why those that wait should go before it; empty: they should not."""
    if request.slo_ttft_s is None or view.num_waiting < 2:
        return ""
    spare_s = request.slo_ttft_s - view.waited_s - chosen.ttft_s
    if spare_s < 0:
        return "it would be late; those that can be in time go first"
    if _keeps_a_step_empty(request, way.prefill, spare_s, view):
        return "it would be in time only in a step that leaves others out; they go first"
    return ""


def _keeps_a_step_empty(request: RoutableRequest, prefill: PrefillCost, spare_s: float, view: FleetView) -> bool:
    """Whether its step, which may end `spare_s` later and no more, computes less than one that those who can be in time
    fill, by more than the one prompt that would be late in that.

    A step of `step_s` seconds, `fixed_s` of them beside its prompts, computes fixed_s / step_s prompts more in the same
    time with one more in it. From a short step to a long one that adds up to a logarithm.
    """
    worker, others = prefill.worker, view.hopeful
    if worker.num_passed or others.num < 2 or not others.work_s:
        return False
    uncached = request.prompt_tokens - worker.cached_tokens
    free_tokens = worker.facts.max_step_tokens - worker.num_streams - worker.shared_tokens - uncached
    num_waiting = (others.num - 1) / view.num_computing
    joining_s = min(num_waiting, free_tokens / max(1.0, others.uncached_tokens)) * others.work_s
    fixed_s = worker.latency.fixed_s(worker.num_streams, worker.kv_tokens)
    if joining_s <= spare_s or not fixed_s:
        return False
    step_s = fixed_s + worker.shared_s + worker.latency.work_s(uncached, request.prompt_tokens)
    return fixed_s / others.work_s * math.log((step_s + joining_s) / (step_s + spare_s)) > 1


def _shares_badly(request: RoutableRequest, prefill: PrefillCost, view: FleetView) -> str:
    """Why the step that begins next should begin without it; empty: it should not.

    In that step it keeps those that are in it for as long as its work there takes. In a step of its own it costs
    everybody who waits, itself first, what a step costs beside the work.
    """
    worker = prefill.worker
    if not worker.num_sharing or worker.num_passed:
        return ""
    slo_s = request.slo_ttft_s
    if prefill.misses_ttft and slo_s is not None and (view.waited_s < slo_s or view.makes_way):
        return f"{worker.worker} begins a step in which another prompt would be late with it"
    num_waiting = max(1.0, view.num_waiting / view.num_computing)
    saved_s = worker.latency.fixed_s(worker.num_streams, worker.kv_tokens)
    if worker.num_sharing * prefill.longer_s <= num_waiting * saved_s:
        return ""
    waits = f"{worker.num_sharing} prompts would wait {prefill.longer_s:.2f} s longer for"
    return f"{worker.worker} begins a step that {waits}"
