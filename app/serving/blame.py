"""Who is to blame for failed legs: a function of all that failed so far, for a request's next attempt to route by.

| what failed                                            | blamed | suspected        | avoided for now |
|--------------------------------------------------------|--------|------------------|-----------------|
| any leg: its worker was lost, left or could not go on  | it     |                  |                 |
| any leg: its worker has no room, or another role now   |        |                  | it              |
| a handover: either leg, before the decode leg's token   |        | both of the pair |                 |
| … two of them, with one worker in common               | it     | none of these    |                 |
| a ticket that was too old                              |        |                  |                 |

A handover that fails is the fault of one of two, and a single failure does not tell which. Whoever failed with two
different partners explains both failures, so the partners are cleared. A suspect is avoided as long as anybody else is
there: the next attempt is as good as it can be whichever of the two it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from app.serving.errors import Retriable, RoleChanged, TicketExpired, WorkerBusy, WorkerDisagrees, WorkerFailed
from planes.wire.messages import WorkerId

Pair = tuple[WorkerId, WorkerId]
"""A prefill and a decode worker."""


class Cause(StrEnum):
    """What a failed leg says about workers."""

    WORKER = "worker"
    """One worker is lost, leaves, or could not go on."""
    BUSY = "busy"
    """It is well, and has no room now."""
    ROLE = "role"
    """It is well, and does something else now, which the router is about to hear."""
    HANDOVER = "handover"
    """A KV cache did not arrive: one of two workers."""
    EXPIRED = "expired"
    """Nobody's fault: time."""


WELL = frozenset({Cause.BUSY, Cause.ROLE})
"""Causes for which a worker is left out for now and may be asked again."""


@dataclass(frozen=True, slots=True)
class LegFailure:
    """One leg that failed. worker: whose it was.  pair: prefill and decode worker of the handover that failed."""

    kind: Cause
    worker: WorkerId
    pair: Pair | None = None


@dataclass(frozen=True, slots=True)
class Suspects:
    """prefill: those of `suspected` that were to give a KV cache: the more likely ones, where one of two must serve."""

    blamed: frozenset[WorkerId] = frozenset()
    suspected: frozenset[WorkerId] = frozenset()
    prefill: frozenset[WorkerId] = frozenset()
    busy: frozenset[WorkerId] = frozenset()

    def exclusions(self) -> list[frozenset[WorkerId]]:
        """Whom to leave out, the best way first; a later one for the case that nobody is left by those before."""
        blamed = self.blamed | self.busy
        ways = [blamed | self.suspected, blamed | self.prefill, blamed]
        return [way for number, way in enumerate(ways) if way not in ways[:number]]


def failure_of(error: Retriable, *, pair: Pair | None = None) -> LegFailure:
    """pair: where the leg was part of a handover that had not been completed."""
    match error:
        case WorkerBusy():
            return LegFailure(Cause.BUSY, error.worker)
        case RoleChanged():
            return LegFailure(Cause.ROLE, error.worker)
        case TicketExpired():
            return LegFailure(Cause.EXPIRED, error.worker)
        case WorkerFailed() | WorkerDisagrees() if pair is not None:
            return LegFailure(Cause.HANDOVER, error.worker, pair)
        case _:
            return LegFailure(Cause.WORKER, error.worker)


def suspects(failures: Sequence[LegFailure]) -> Suspects:
    """The table above."""
    blamed = {each.worker for each in failures if each.kind is Cause.WORKER}
    busy = {each.worker for each in failures if each.kind in WELL}
    pairs = {each.pair for each in failures if each.pair is not None}
    partners: dict[WorkerId, set[WorkerId]] = {}
    for prefill, decode in pairs:
        partners.setdefault(prefill, set()).add(decode)
        partners.setdefault(decode, set()).add(prefill)
    blamed |= {worker for worker, others in partners.items() if len(others) > 1}
    unexplained = [pair for pair in pairs if blamed.isdisjoint(pair)]
    return Suspects(
        frozenset(blamed),
        frozenset(worker for pair in unexplained for worker in pair),
        frozenset(prefill for prefill, _ in unexplained),
        frozenset(busy - blamed),
    )
