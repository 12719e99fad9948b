"""A client's preference about the handover, enforced here for every policy, a user's own ones included.

`Fleet.view` offers only the workers that the preference leaves: nobody to prefill elsewhere (`never`), or those that
can pair (`always`). What remains is a policy that serves alone though it was to hand over: then the cheapest pair that
it has weighed is taken, and where it has weighed none the pair that `headrace` would take.
"""

from router import cost
from router.errors import NoPair
from router.policies.headrace import Headrace
from router.policy import Choice, FleetView
from router.request import Candidate, HandoverPreference, RoutableRequest


def enforced(request: RoutableRequest, choice: Choice, view: FleetView) -> Choice:
    """A policy's choice, or the nearest one that the client wants.  Raises:  NoPair."""
    if request.handover is not HandoverPreference.ALWAYS:
        return choice
    pairs = _pairs(choice, view) or _pairs(Headrace().choose(request, view), view)
    if not pairs:
        raise NoPair(request.model, num_workers=len(view.decode))
    if choice.chosen in pairs:
        return Choice(choice.chosen, pairs, choice.is_held, choice.held_because, choice.room_s)
    chosen = min(pairs, key=_total)
    held_because = _held_because(request, chosen, view, choice.room_s)
    return Choice(chosen, pairs, bool(held_because), held_because, choice.room_s)


def _pairs(choice: Choice, view: FleetView) -> tuple[Candidate, ...]:
    givers = {worker.worker: worker for worker in view.prefill}
    takers = {worker.worker: worker for worker in view.decode}
    return tuple(
        option
        for option in choice.candidates
        if option.prefill in givers and cost.can_hand_over(givers[option.prefill], takers[option.decode])
    )


def _held_because(request: RoutableRequest, chosen: Candidate, view: FleetView, room_s: float) -> str:
    """Policies that hold requests back give a `room_s`; by that measure this pair is held back, too."""
    if not room_s:
        return ""
    giver = next(worker for worker in view.prefill if worker.worker == chosen.prefill)
    if because := giver.busy_because(room_s):
        return because
    taker = next(worker for worker in view.decode if worker.worker == chosen.decode)
    return "" if cost.decode_leg(request, taker).has_room else f"{chosen.decode} has no room to decode"


def _total(option: Candidate) -> float:
    return option.total_s
