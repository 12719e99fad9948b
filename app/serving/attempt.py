"""One attempt to serve a request: a route, and what came of it."""

import msgspec

from planes.wire.frames import Usage
from planes.wire.messages import WorkerId
from router.request import Failure, Observed, Outcome, Route


class Attempt(msgspec.Struct):
    """Kept by the exchange; everybody else only reads.

    prefill, decode: usage as the legs' workers say; a local leg counts as decode.
    """

    route: Route
    bound_at: float
    num_tokens_before: int
    first_at: float | None = None
    prefilled_by: WorkerId | None = None
    """Which worker took the prompt from the queue, if any did."""
    prefilled_at: float | None = None
    """Instant at which the prompt was known to be computed."""
    handover_at: float | None = None
    """Instant at which a leg was started that takes the KV cache."""
    decoding_at: float | None = None
    """Instant of the first news of the worker that decodes."""
    ended_at: float | None = None
    prefill: Usage | None = None
    decode: Usage | None = None
    outcome: Outcome = Outcome.FAILED
    failure: Failure | None = None

    @property
    def prefill_worker(self) -> WorkerId:
        """The worker that computes the prompt."""
        return self.prefilled_by or self.route.prefill or self.route.decode

    @property
    def computed(self) -> Usage | None:
        """What the worker measured that computed the prompt."""
        return self.prefill or self.decode

    @property
    def moved(self) -> Usage | None:
        """What the worker measured that took the KV cache in; None without a handover."""
        return self.decode if self.prefill is not None else None

    def observed(self, num_tokens: int) -> Observed:
        """For the router, when the client has `num_tokens`."""
        computed, moved = self.computed, self.moved
        return Observed(
            ttft_s=None if self.first_at is None else self.first_at - self.bound_at,
            queue_s=None if computed is None else computed.queue_s,
            prefill_s=None if computed is None else computed.prefill_s,
            cached_tokens=None if computed is None else computed.cached_tokens,
            handover_s=None if moved is None else moved.handover_s,
            handover_bytes=None if moved is None else moved.handover_bytes,
            completion_tokens=num_tokens - self.num_tokens_before,
            outcome=self.outcome,
            prefill=self.prefilled_by,
            failure=self.failure,
        )
