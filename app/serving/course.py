"""A job, and its course: what has become of it so far. Plain bookkeeping; `relay.py` acts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from app.http.response import Answer, Headers
from app.metrics import RequestSummary
from app.openai.request_headers import ROUTE, HeaderOptions, route_header
from planes.wire.blocks import Hashes, Tokens
from planes.wire.errors import HeadraceError
from planes.wire.frames import Done, Format, Sampling, Usage
from planes.wire.messages import RequestId, WorkerId
from router.request import Failure, HandoverPreference, Observed, Outcome, RoutableRequest, Route


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A request, parsed and tokenized.

    arrived_at, deadline: instants of the event loop's clock.  prompt: shape (n,), uint32, n >= 1.
    sampling: `max_tokens` is resolved.
    """

    request: RequestId
    model: str
    prompt: Tokens
    blocks: Hashes
    block_size: int
    sampling: Sampling
    format: Format
    arrived_at: float
    deadline: float
    cache_salt: str = ""
    priority: int = 0
    tenant: str = ""
    slo_ttft_s: float | None = None
    options: HeaderOptions = field(default_factory=HeaderOptions)

    @property
    def is_resumable(self) -> bool:
        """Whether another worker can go on from the tokens; else it starts over, if the client has got nothing."""
        return self.sampling.n == 1 and (self.format.is_streaming or self.sampling.logprobs is None)

    @property
    def is_first_token_early(self) -> bool:
        """Whether the prefill worker's token may go to the client before the handover.

        It must be the token that the decode worker would go on from. Seeds and penalties tell generated tokens from
        the prompt's, and a resumed leg counts it among the latter. After a prompt of whole blocks the decode engine
        would need a block that the prefill engine does not have. With one token in all there is nothing to hand over.
        """
        s = self.sampling
        if s.max_tokens == 1 or not self.format.is_streaming:
            return s.max_tokens == 1
        is_plain = (s.presence_penalty, s.frequency_penalty, s.repetition_penalty, s.min_tokens) == (0, 0, 1, 0)
        has_no_seed = s.seed is None or s.temperature == 0
        return s.n == 1 and is_plain and has_no_seed and len(self.prompt) % self.block_size != 0

    def routable(self, *, num_tokens: int = 0, excluded: frozenset[WorkerId] = frozenset()) -> RoutableRequest:
        """What the router may know, after `num_tokens` have been generated.

        A handover that failed once need not be tried again, whatever the client options.
        """
        handover = self.options.handover
        if handover is HandoverPreference.ALWAYS and (num_tokens or excluded):
            handover = HandoverPreference.AUTO
        return RoutableRequest(
            request=self.request,
            model=self.model,
            blocks=self.blocks,
            prompt_tokens=len(self.prompt),
            expected_tokens=max(1, self.sampling.max_tokens - num_tokens),
            deadline=self.deadline,
            priority=self.priority,
            tenant=self.tenant,
            slo_ttft_s=None if num_tokens or excluded else self.slo_ttft_s,
            excluded=excluded,
            is_local_only=self.sampling.n > 1 or num_tokens > 0,
            is_first_token_exact=self.is_first_token_early,
            handover=handover,
        )


@dataclass(slots=True)
class Attempt:
    """One route, and what came of it. prefill, decode: usage as the legs' workers say; a local leg counts as decode."""

    route: Route
    bound_at: float
    num_tokens_before: int
    first_at: float | None = None
    prefilled_by: WorkerId | None = None
    """Who took the prompt from the queue, if anybody did."""
    prefill: Usage | None = None
    decode: Usage | None = None
    outcome: Outcome = Outcome.FAILED
    failure: Failure | None = None

    @property
    def prefill_worker(self) -> WorkerId:
        """Who computes the prompt."""
        return self.prefilled_by or self.route.prefill or self.route.decode


@dataclass(slots=True, eq=False)
class Course:
    """A job under way."""

    job: Job
    answer: Answer
    tokens: list[int] = field(default_factory=list)
    """What the client has got; with n > 1 of all choices, good for counting only."""
    attempts: list[Attempt] = field(default_factory=list)
    excluded: frozenset[WorkerId] = frozenset()
    num_replacements: int = 0
    """How often it waited for a worker because none was left."""
    waits_until: float | None = None
    """When it stops waiting for one; None: it does not wait."""
    lost: HeadraceError | None = None
    fallback: str = ""
    """Why a request that could have been handed over was not: the code of the failure before."""
    bypass: str = ""
    """Why a prompt that was to go through the prefill queue was sent directly."""
    code: str = "internal_error"
    first_at: float | None = None
    ended_at: float = 0.0
    _num_failures: int = 0
    _num_tokens_at_failure: int = 0

    def routable(self) -> RoutableRequest:
        return self.job.routable(num_tokens=len(self.tokens), excluded=self.excluded)

    def leg_request(self) -> RequestId:
        """The name of this attempt's legs: an engine may still be busy forgetting the attempt before."""
        number = len(self.attempts)
        return self.job.request if number == 1 else RequestId(f"{self.job.request}.{number}")

    def bound(self, route: Route, *, now: float) -> Attempt:
        """A new attempt begins."""
        if self.lost is not None and route.prefill is None and self.attempts[-1].route.prefill is not None:
            self.fallback = self.lost.code
        else:
            self.fallback = ""
        self.bypass = ""
        attempt = Attempt(route, now, len(self.tokens))
        self.attempts.append(attempt)
        return attempt

    def failed(self, exc: HeadraceError) -> int:
        """The attempt has failed.  Returns: how many have in a row without a new token."""
        has_progress = len(self.tokens) > self._num_tokens_at_failure
        self._num_failures = 1 if has_progress else self._num_failures + 1
        if not self.job.is_resumable:
            self.tokens.clear()  # it starts over
        self._num_tokens_at_failure = len(self.tokens)
        self.lost = exc
        if (worker := worker_of(exc)) is not None:
            self.excluded |= {worker}
        return self._num_failures

    @property
    def write(self) -> Callable[[bytes], None]:
        """Where payloads go; an answer in one piece is taken from its Done instead."""
        return self.answer.write if self.job.format.is_streaming else drop

    def first_token(self, *, now: float) -> None:
        attempt = self.attempts[-1]
        if attempt.first_at is None:
            attempt.first_at = now
        if self.first_at is None:
            self.first_at = now

    def take(self, done: Done, *, now: float) -> None:
        """What a leg that was not to speak has computed all the same."""
        self.first_token(now=now)
        self.tokens.extend(done.tokens)

    def headers(self) -> Headers:
        """What the answer's head tells about the request."""
        headers = [("x-request-id", str(self.job.request))]
        if self.attempts:
            route, prefill = self.attempts[-1].route, self.attempts[-1].prefill_worker
            headers += [("x-headrace-prefill", prefill), ("x-headrace-decode", route.decode)]
            headers.append(("x-headrace-policy", route.policy))
            if self.job.options.is_explained:
                headers.append((ROUTE, route_header(route)))
        if self.fallback or self.bypass:
            headers.append(("x-headrace-fallback", self.fallback or self.bypass))
        return headers

    def observed(self) -> Observed:
        """What came of the last attempt, for the router."""
        attempt = self.attempts[-1]
        computing = attempt.prefill or attempt.decode
        moving = attempt.decode if attempt.prefill is not None else None
        return Observed(
            ttft_s=None if attempt.first_at is None else attempt.first_at - attempt.bound_at,
            queue_s=None if computing is None else computing.queue_s,
            prefill_s=None if computing is None else computing.prefill_s,
            cached_tokens=None if computing is None else computing.cached_tokens,
            handover_s=None if moving is None else moving.handover_s,
            handover_bytes=None if moving is None else moving.handover_bytes,
            completion_tokens=len(self.tokens) - attempt.num_tokens_before,
            outcome=attempt.outcome,
            prefill=attempt.prefilled_by,
            failure=attempt.failure,
        )

    def summary(self) -> RequestSummary:
        """For the metrics."""
        attempt = self.attempts[-1] if self.attempts else None
        computing = attempt and (attempt.prefill or attempt.decode)
        moving = attempt.decode if attempt and attempt.prefill else None
        num_tokens = len(self.tokens)
        has_gaps = self.first_at is not None and num_tokens > 1 and self.job.sampling.n == 1
        return RequestSummary(
            model=self.job.model,
            code=self.code,
            prompt_tokens=len(self.job.prompt),
            completion_tokens=num_tokens,
            cached_tokens=computing.cached_tokens if computing else 0,
            ttft_s=None if self.first_at is None else self.first_at - self.job.arrived_at,
            itl_s=(self.ended_at - self.first_at) / (num_tokens - 1)
            if has_gaps and self.first_at is not None
            else None,
            prefill_s=computing.prefill_s if computing else None,
            handover_s=moving.handover_s if moving else None,
            handover_bytes=moving.handover_bytes if moving else 0,
        )

    def record(self) -> dict[str, Any]:
        """For the log: one line at the end of the request."""
        summary = self.summary()
        route = self.attempts[-1].route if self.attempts else None
        return {
            "request_id": self.job.request,
            "model": self.job.model,
            "outcome": self.code,
            "prefill": route and self.attempts[-1].prefill_worker,
            "decode": route and route.decode,
            "attempts": len(self.attempts),
            "held_s": route and round(route.held_s, 4),
            "duration_s": round(self.ended_at - self.job.arrived_at, 4),
            "ttft_s": _rounded(summary.ttft_s),
            "itl_s": _rounded(summary.itl_s),
            "prompt_tokens": summary.prompt_tokens,
            "completion_tokens": summary.completion_tokens,
            "cached_tokens": summary.cached_tokens,
            "handover_bytes": summary.handover_bytes,
            "handover_s": _rounded(summary.handover_s),
        }


def worker_of(exc: HeadraceError) -> WorkerId | None:
    """The worker that an error names."""
    return getattr(exc, "worker", None)


def drop(_: bytes) -> None:
    """Takes the payloads of a leg that has nothing to say to the client."""


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
