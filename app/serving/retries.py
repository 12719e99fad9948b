"""How often and how long one request is tried again: its failures so far, and the patience that is left."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from app.serving.blame import WELL, Cause, LegFailure, suspects
from planes.wire.messages import WorkerId

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0
"""Between two looks for a worker; each pause is twice the one before."""
_NOBODY: Final[Sequence[frozenset[WorkerId]]] = (frozenset(),)
"""One for all requests: an empty frozenset takes 200 bytes."""


@dataclass(frozen=True, slots=True)
class ExchangeLimits:
    """max_attempts: failed legs in a row, without a new token, that end a request.

    replacement_s: how long an answer that has tokens waits for a worker when none is left, or none has room.
    """

    max_attempts: int = 3
    replacement_s: float = 60.0


class Retries:
    """One request's. `now` is always the exchange's."""

    __slots__ = (
        "_busy_until",
        "_exclusions",
        "_failures",
        "_limits",
        "_num_in_row",
        "_num_tokens",
        "_num_waits",
        "_pause_s",
        "_waits_until",
    )

    def __init__(self, limits: ExchangeLimits) -> None:
        self._limits = limits
        self._failures: tuple[LegFailure, ...] = ()
        self._exclusions = _NOBODY
        self._num_in_row = 0
        self._num_tokens = 0
        """What the client had at the last failure."""
        self._pause_s = _FIRST_PAUSE_S
        self._busy_until: float | None = None
        self._waits_until: float | None = None
        self._num_waits = 0

    @property
    def has_failures(self) -> bool:
        return bool(self._failures)

    @property
    def excluded(self) -> frozenset[WorkerId]:
        """The workers that the next attempt leaves out."""
        return self._exclusions[0]

    @property
    def is_waiting(self) -> bool:
        """A begun answer waits for a worker."""
        return self._waits_until is not None

    @property
    def has_busy(self) -> bool:
        """Some worker is left out only because it had no room, or another role."""
        return any(each.kind in WELL for each in self._failures)

    def failed(self, failure: LegFailure, *, num_tokens: int, now: float) -> bool:
        """Count a failure. Returns whether it was the last.

        That a worker is busy says nothing about a begun answer: it goes on asking for `replacement_s`. So does any that
        came to a worker with another role, which says nothing about the request.
        """
        self._failures = (*self._failures, failure)
        self._judge()
        if num_tokens > self._num_tokens:
            self._num_in_row, self._busy_until, self._pause_s = 0, None, _FIRST_PAUSE_S
        self._num_tokens = num_tokens
        if failure.kind is Cause.ROLE or (failure.kind is Cause.BUSY and num_tokens):
            if self._busy_until is None:
                self._busy_until = now + self._limits.replacement_s
            if failure.kind is Cause.BUSY or now < self._busy_until:
                return now >= self._busy_until
        self._num_in_row += 1
        return self._num_in_row >= self._limits.max_attempts

    def relax(self) -> bool:
        """Nobody is left: leave fewer workers out. Returns whether there was a way."""
        if len(self._exclusions) == 1:
            return False
        self._exclusions = self._exclusions[1:]
        return True

    def forgive(self, worker: WorkerId) -> None:
        """A worker has come (back): what it did before may be of another start."""
        self._failures = tuple(
            each for each in self._failures if worker != each.worker and (each.pair is None or worker not in each.pair)
        )
        self._judge()

    def back_off(self, now: float) -> float:
        """When to look again. Whoever was busy may have room by then, and roles will be known."""
        self._failures = tuple(each for each in self._failures if each.kind not in WELL)
        self._judge()
        pause_s, self._pause_s = self._pause_s, min(_LONGEST_PAUSE_S, 2 * self._pause_s)
        instant = now + pause_s
        return instant if self._waits_until is None else min(instant, self._waits_until)

    def begin_wait(self, now: float) -> bool:
        """Wait for a worker, from now on. Returns whether that was new: it may be waiting already."""
        if self._waits_until is not None:
            return False
        self._waits_until = now + self._limits.replacement_s
        self._num_waits += 1
        return True

    def end_wait(self) -> bool:
        """A worker was found. Returns whether it was waited for."""
        was_waiting, self._waits_until = self.is_waiting, None
        return was_waiting

    def is_out_of_patience(self, now: float) -> bool:
        """Whether the wait is over. A request that lost its worker after each wait may be what kills workers."""
        if self._waits_until is None:
            return False
        return now >= self._waits_until or self._num_waits > self._limits.max_attempts

    def _judge(self) -> None:
        self._exclusions = suspects(self._failures).exclusions()
