"""A request as the gateway serves it: parsed, checked and tokenized."""

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from app.openai.request_headers import HeaderOptions
from app.telemetry.trace_context import TraceContext
from planes.wire.blocks import Hashes, Tokens
from planes.wire.frames import Format, Generate, Leg, Sampling, StreamId, needs_own_tokens, pack_tokens
from planes.wire.messages import Adapter, RequestId, WorkerId
from router.request import HandoverPreference, RoutableRequest, SloSource


class Meter(Protocol):
    """Counts what a request has used; `app.keys.meter.RequestMeter` does."""

    def spent(self, *, prompt_tokens: int, completion_tokens: int) -> None:
        """More has been used. May be called after the request has ended."""

    def headers(self) -> list[tuple[str, str]]:
        """What the answer's head says of it."""


class Prewarm(Struct, frozen=True):
    """Only the prompt is wanted, and how the answer without a token: see `app/http/prewarmed.py`."""

    is_streaming: bool
    include_usage: bool


class GatewayRequest(Struct, frozen=True, eq=False):
    """arrived_at, deadline: instants on the gateway's clock.  prompt: shape (n,), uint32, n >= 1.

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
    slo_itl_s: float | None = None
    slo_ttft_from: SloSource = SloSource.REQUEST
    slo_itl_from: SloSource = SloSource.REQUEST
    """Who said them, if anybody did."""
    options: HeaderOptions = HeaderOptions()
    has_own_tokens: bool = True
    """Whether its workers can tell an answer's tokens from its prompt's when they go on from them."""
    card_digest: str = ""
    """Of the model card that made the tokens."""
    ignored: tuple[str, ...] = ()
    """Names of fields that nobody knows."""
    prewarm: Prewarm | None = None
    trace: TraceContext | None = None
    """None: nobody follows it."""
    adapter: Adapter | None = None
    meter: Meter | None = None
    beside: "tuple[GatewayRequest, ...]" = ()
    """Those that are answered in the same answer, after this one."""

    @property
    def answer_tokens(self) -> int:
        """Of all choices, at most."""
        return 0 if self.format.kind == "embedding" else self.sampling.n * self.sampling.max_tokens

    @property
    def is_resumable(self) -> bool:
        """Whether another worker can go on from the tokens; else it starts over, if the client has got nothing.

        What earlier tokens were worth is known to nobody else, and a response says it again in the end.
        """
        s = self.sampling
        if not self.has_own_tokens and needs_own_tokens(s):
            return False
        is_told_once = self.format.is_streaming and self.format.kind != "response"
        return s.n == 1 and (is_told_once or (s.logprobs is None and s.prompt_logprobs is None))

    @property
    def is_first_token_early(self) -> bool:
        """Whether the prefill worker's token may go to the client before the handover.

        The decode worker's engine goes on from it as from a token of its own: seeds, penalties, `min_tokens`,
        `bad_words` and grammars count it. Where it cannot tell its own, it must draw the same token once more. With one
        token in all there is nothing to hand over.
        """
        s = self.sampling
        is_known = self.has_own_tokens or s.temperature == 0
        return s.max_tokens == 1 or (self.format.is_streaming and self.is_resumable and is_known)

    def routable(self, *, num_tokens: int, excluded: frozenset[WorkerId], is_retry: bool) -> RoutableRequest:
        """What the router may know, after `num_tokens` have been generated.

        A handover that failed once need not be tried again, whatever the client prefers.
        """
        handover = self.options.handover
        if is_retry and handover is HandoverPreference.ALWAYS:
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
            slo_ttft_s=self.slo_ttft_s,
            slo_itl_s=self.slo_itl_s,
            slo_ttft_from=self.slo_ttft_from,
            slo_itl_from=self.slo_itl_from,
            is_retry=is_retry,
            excluded=excluded,
            is_local_only=self.sampling.n > 1 or self.sampling.prompt_logprobs is not None or num_tokens > 0,
            is_first_token_exact=self.is_first_token_early,
            handover=handover,
            card_digest=self.card_digest,
            block_size=self.block_size,
            adapter=0 if self.adapter is None else self.adapter.number,
            max_context=len(self.prompt) + (0 if self.format.kind == "embedding" else self.sampling.max_tokens),
        )

    def generate(self, leg: Leg, name: RequestId, resume: Sequence[int], *, now: float) -> Generate:
        """The frame that starts a leg. name: of the leg, on its worker.  resume: tokens that the client has."""
        return Generate(
            stream=StreamId(0),
            request=name,
            prompt=pack_tokens(self.prompt),
            sampling=self.sampling,
            format=self.format,
            leg=leg,
            resume=pack_tokens(list(resume)) if resume else b"",
            cache_salt=self.cache_salt,
            priority=self.priority,
            timeout_s=max(0.0, self.deadline - now),
            adapter=self.adapter,
        )
