"""Where a request's time went: a fold over its exchange, made after its end when somebody asks.

The gateway's own clock says when a request came, was queued, got its route, and when there was news of a leg; workers
say how long they took. So a prefill ends at an instant of this clock and began so much earlier, a handover begins at
one and ends so much later: no clock of another machine is compared with ours.

    came ─prepare─ submitted ─queue─ bound ─wait─ ·─prefill─ prefilled ─handover─ ·─decode─ ended
                       ▲                                                                      │
                       └────────────────── the next attempt, where one fails ─────────────────┘
"""

from collections.abc import Iterator
from typing import Self

import msgspec

from app.metrics import RequestSummary
from app.serving.attempt import Attempt
from app.serving.exchange import Exchange
from planes.wire.messages import RequestId
from router.request import Outcome
from router.timeline import Interruption, Stage, StageKind, Timeline

_PREPARE, _QUEUE, _WAIT, _PREFILL, _HANDOVER, _DECODE = StageKind  # bound once, see CONTRIBUTING.md
_MAX_TOLD = 8
"""Attempts of one request that are told, the latest: a busy fleet may cost many."""


class Ending(msgspec.Struct, frozen=True):
    """What is kept of a request that has ended, without its prompt and tokens: the fold waits until somebody asks."""

    request: RequestId
    arrived_at: float
    submitted_at: float
    ended_at: float
    attempts: list[Attempt]
    """The latest; one more than are told, which says when the next began to wait."""
    num_forgotten: int
    """Attempts before these."""
    told: RequestSummary

    @classmethod
    def of(cls, exchange: Exchange, told: RequestSummary, *, ended_at: float) -> Self:
        """Of an ended exchange.  told: its summary."""
        request, attempts = exchange.request, exchange.attempts
        num_forgotten = max(0, len(attempts) - _MAX_TOLD - 1)
        latest = attempts[num_forgotten:]
        return cls(request.request, request.arrived_at, exchange.submitted_at, ended_at, latest, num_forgotten, told)

    def timeline(self) -> Timeline:
        """Where its time went."""
        last, told = self.attempts[-1] if self.attempts else None, self.told
        return Timeline(
            request=self.request,
            model=told.model,
            received_at=self.arrived_at,
            end_s=self.ended_at - self.arrived_at,
            code=told.code,
            policy=last.route.policy if last else "",
            prefill=last.prefill_worker if last else None,
            decode=last.route.decode if last else None,
            prompt_tokens=told.prompt_tokens,
            completion_tokens=told.completion_tokens,
            cached_tokens=told.cached_tokens,
            ttft_s=told.ttft_s,
            itl_s=told.itl_s,
            overhead_s=told.overhead_s or 0.0,
            stages=tuple(self._stages()),
            interruptions=tuple(self._interruptions()),
        )

    def _stages(self) -> list[Stage]:
        zero, unrouted_at = self.arrived_at, self.submitted_at
        stages = [Stage(_PREPARE, 1, 0.0, unrouted_at - zero)]
        for number, attempt, before in self._told_attempts():
            if before is not None:
                unrouted_at = before.ended_at or unrouted_at
            stages.append(Stage(_QUEUE, number, unrouted_at - zero, attempt.bound_at - zero))
            unrouted_at = self.ended_at if attempt.ended_at is None else attempt.ended_at
            stages += self._served(number, attempt, unrouted_at)
        if unrouted_at < self.ended_at:
            number = self.num_forgotten + len(self.attempts) + 1
            stages.append(Stage(_QUEUE, number, unrouted_at - zero, self.ended_at - zero))
        return stages

    def _told_attempts(self) -> list[tuple[int, Attempt, Attempt | None]]:
        """With their numbers and those before them."""
        numbers = range(self.num_forgotten + 1, self.num_forgotten + len(self.attempts) + 1)
        return list(zip(numbers, self.attempts, [None, *self.attempts], strict=False))[-_MAX_TOLD:]

    def _num_tokens(self, number: int) -> int:
        """What the client had when this attempt was over, and the next one goes on from."""
        following = self.attempts[number - self.num_forgotten :]
        return following[0].num_tokens_before if following else self.told.completion_tokens

    def _served(self, number: int, attempt: Attempt, left_at: float) -> list[Stage]:
        """What workers did in one attempt, which was left at `left_at`."""
        zero, bound_at, prefilled_at = self.arrived_at, attempt.bound_at, attempt.prefilled_at
        worker, computed = attempt.prefill_worker, attempt.computed
        if prefilled_at is None:
            return [Stage(_PREFILL, number, bound_at - zero, left_at - zero, worker)]
        stages = list[Stage]()
        begun_at, cached_tokens = bound_at, 0
        if computed is not None:
            begun_at, cached_tokens = max(bound_at, prefilled_at - computed.prefill_s), computed.cached_tokens
            stages.append(Stage(_WAIT, number, bound_at - zero, begun_at - zero, worker))
        known_tokens = self.told.prompt_tokens + attempt.num_tokens_before
        begin_s, end_s, num_computed = begun_at - zero, prefilled_at - zero, max(0, known_tokens - cached_tokens)
        stages.append(Stage(_PREFILL, number, begin_s, end_s, worker, None, num_computed, cached_tokens))
        moved_at, decode = prefilled_at, attempt.route.decode
        if attempt.handover_at is not None:
            moved_at = _moved_at(attempt, attempt.handover_at, left_at)
            begun_at = min(max(attempt.handover_at, prefilled_at), moved_at)
            num_bytes = attempt.moved.handover_bytes if attempt.moved else 0
            begin_s, end_s = begun_at - zero, moved_at - zero
            stages.append(Stage(_HANDOVER, number, begin_s, end_s, decode, worker, num_bytes=num_bytes))
        if attempt.decoding_at is not None:
            new_tokens = max(0, self._num_tokens(number) - attempt.num_tokens_before)
            stages.append(Stage(_DECODE, number, moved_at - zero, left_at - zero, decode, tokens=new_tokens))
        return stages

    def _interruptions(self) -> Iterator[Interruption]:
        for number, attempt, _ in self._told_attempts():
            failure, ended_at = attempt.failure, attempt.ended_at
            if failure is not None and attempt.outcome is Outcome.INTERRUPTED and ended_at is not None:
                is_migration = self._num_tokens(number) > 0
                at_s = ended_at - self.arrived_at
                yield Interruption(number, at_s, failure.code, failure.worker, is_migration)


def _moved_at(attempt: Attempt, handover_at: float, left_at: float) -> float:
    """When the KV cache was there, as far as is known: its taker says how long it took, or has begun to decode."""
    latest = left_at if attempt.decoding_at is None else attempt.decoding_at
    return latest if attempt.moved is None else min(latest, handover_at + attempt.moved.handover_s)
