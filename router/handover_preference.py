"""A client's preference about the handover, enforced here for every policy, a user's own ones included.

`Fleet.view` offers only the workers that the preference leaves: nobody to prefill elsewhere (`never`), or those that
can pair (`always`). What remains is a policy that serves alone though it was to hand over: then the cheapest pair that
it has weighed is taken, and where it has weighed none the pair that `headrace` would take.
"""

from typing import Final

import msgspec

from router import cost
from router.errors import NoPair
from router.policies.headrace import Headrace
from router.policy import Choice, FleetView
from router.request import Candidate, HandoverPreference, RoutableRequest

_ALWAYS: Final = HandoverPreference.ALWAYS  # bound once, see CONTRIBUTING.md


def enforced(request: RoutableRequest, choice: Choice, view: FleetView) -> Choice:
    """A policy's choice, or the nearest one that the client wants.  Raises:  NoPair."""
    if request.handover is not _ALWAYS:
        return choice
    pairs = _pairs(choice, view) or _pairs(Headrace().choose(request, view), view)
    if not pairs:
        raise NoPair(request.model, num_workers=len(view.decode))
    if choice.chosen in pairs:
        return msgspec.structs.replace(choice, candidates=pairs)
    chosen = min(pairs, key=_total)
    held_because = _held_because(chosen, view, choice.max_backlog_s)
    return Choice(
        chosen=chosen,
        candidates=pairs,
        is_held=bool(held_because),
        held_because=held_because,
        max_backlog_s=choice.max_backlog_s,
    )


def _pairs(choice: Choice, view: FleetView) -> tuple[Candidate, ...]:
    senders = {worker.worker: worker for worker in view.prefill}
    receivers = {worker.worker: worker for worker in view.decode}
    return tuple(
        option
        for option in choice.candidates
        if option.prefill in senders and cost.can_hand_over(senders[option.prefill], receivers[option.decode])
    )


def _held_because(chosen: Candidate, view: FleetView, max_backlog_s: float) -> str:
    """Policies that hold requests back give a `max_backlog_s`; by that measure this pair is held back, too."""
    if not max_backlog_s:
        return ""
    sender = next(worker for worker in view.prefill if worker.worker == chosen.prefill)
    if because := sender.busy_because(max_backlog_s):
        return because
    return f"{chosen.waits_for_room} has no room for it" if chosen.waits_for_room else ""


def _total(option: Candidate) -> float:
    return option.total_s
