"""What comes into the router and what comes out of it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from planes.wire.blocks import Hashes
from planes.wire.messages import RequestId, WorkerId
from router.timeline import Timeline


class Sacrifice(StrEnum):
    """What a way to serve a request gives up, each worse than all before it."""

    NOTHING = ""
    PAUSE = "streams stand still for long"
    TTFT = "its time to first token"
    TTFT_AND_PAUSE = "its time to first token, and streams stand still for long"
    ITL = "a stream's time between tokens"
    ITL_AND_PAUSE = "a stream's time between tokens, and streams stand still for long"
    ITL_AND_TTFT = "a stream's time between tokens, and its time to first token"
    EVERYTHING = "a stream's time between tokens, and its time to first token, and streams stand still for long"


SACRIFICE_S: Final = 1e9
"""More than any way costs: where a first token has a day, a second of standing still costs days. Sums keep a
microsecond."""
_SACRIFICE_S = {sacrifice: number * SACRIFICE_S for number, sacrifice in enumerate(Sacrifice)}


class SloSource(StrEnum):
    """Who said by when tokens shall come. Whoever stands first here, and says anything, is followed."""

    REQUEST = "request"
    """In its body, or else in a header."""
    KEY = "key"
    """The tenant's API key."""
    MODEL = "model"
    GATEWAY = "gateway"
    """For all models."""
    NOBODY = ""


class HandoverPreference(StrEnum):
    """What a client asks for in place of the cheapest way; enforced whatever the policy."""

    AUTO = "auto"
    ALWAYS = "always"
    """By two different workers, or not at all."""
    NEVER = "never"
    """By the worker that decodes alone."""


class RoutableRequest(msgspec.Struct, frozen=True, eq=False):
    """All that routing may know of a request. Like the structs below: a frozen dataclass takes thrice as long to make.

    blocks: names of the prompt's full blocks (`planes/wire/blocks.py`).
    expected_tokens: completion tokens to plan with.  deadline: instant after which an answer is worthless.
    """

    request: RequestId
    model: str
    blocks: Hashes
    prompt_tokens: int
    expected_tokens: int
    deadline: float
    priority: int = 0
    """Class: the lower the sooner, negative ones before 0."""
    tenant: str = ""
    slo_ttft_s: float | None = None
    """First token by then; refused at once when no worker is predicted to give it in time, where that is wanted."""
    slo_itl_s: float | None = None
    """Mean time between its tokens at most, seconds."""
    slo_ttft_from: SloSource = SloSource.REQUEST
    slo_itl_from: SloSource = SloSource.REQUEST
    """Who said them, if anybody did."""
    excluded: frozenset[WorkerId] = frozenset()
    """Workers that were just lost to this request (migration, retry)."""
    is_retry: bool = False
    """A worker had begun it: it goes on late rather than be refused."""
    is_local_only: bool = False
    """Must be prefilled where it decodes (`n > 1`, resumed streams)."""
    is_first_token_exact: bool = True
    """The client gets the prefill worker's first token at once, before the handover."""
    handover: HandoverPreference = HandoverPreference.AUTO
    card_digest: str = ""
    """Of the model card that made the tokens: only workers of that card understand them; empty: any."""
    block_size: int = 0
    """Of `blocks`. A worker with blocks of another size holds none of them; 0: every worker's own."""
    max_context: int = 0
    """Tokens that it may grow to, the prompt included: only workers with room for so many take it; 0: any."""
    adapter: int = 0
    """Number of its LoRA adapter: only workers that have loaded it take it; 0: it has none."""

    @property
    def ends_with_prefill(self) -> bool:
        """Whether the token that the prefill worker gives is all that is expected: no decode worker hears of it."""
        return self.expected_tokens == 1 and self.is_first_token_exact


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One way to serve a request, and what it would cost, in seconds. `prefill` is None: the decode worker does it.

    A msgspec struct for the reason that `WorkerView` is one.
    """

    # By position where many are made, for the reason given there.

    prefill: WorkerId | None
    decode: WorkerId
    cached_tokens: int
    """Prompt tokens that the computing worker already holds."""
    decode_cached_tokens: int
    queue_s: float
    prefill_s: float
    handover_s: float
    first_step_s: float
    inflicted_s: float
    """Slowdown of requests already there and still to come."""
    total_s: float
    is_first_early: bool = False
    """The first token does not wait for the handover."""
    decode_s: float = 0.0
    """Its own decoding after the first step. The seconds above and this, less the discount below, are `total_s`."""
    num_passed: int = 0
    """Prompts on the computing worker that this one would be computed before: its queue is without them."""
    gives_up: Sacrifice = Sacrifice.NOTHING
    """Goes before all seconds."""
    waits_for_room: WorkerId | None = None
    """The worker that has no room for it: it should be bound only when that one has."""
    work_s: float = 0.0
    """Of the computing worker's time: its own work, and its share of the steps."""
    early_token_discount_s: float = 0.0
    """Where the first token is early, handover and first step only interrupt the stream: so much less they count."""
    congestion_s: float = 0.0
    """Of `inflicted_s`, what those who wait in the gateway, and those still to come, wait longer for it."""
    strains: bool = False
    """A stream where its prompt is computed would miss its SLO."""
    delays: bool = False
    """So would the first token of a prompt that is in its first step already."""
    shared_s: float = 0.0
    """Of `prefill_s` and `inflicted_s`, what it waits for the prompts of the step that it joins, and they for it."""

    @property
    def order_s(self) -> float:
        """Seconds, after what is given up."""
        return self.total_s + _SACRIFICE_S[self.gives_up]

    @property
    def ttft_s(self) -> float:
        rest = 0.0 if self.is_first_early else self.handover_s + self.first_step_s
        return self.queue_s + self.prefill_s + rest


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The router's answer: who prefills, who decodes; the reservation stands until `Router.release`."""

    request: RequestId
    prefill: WorkerId | None
    decode: WorkerId
    cached_tokens: int
    decode_cached_tokens: int
    predicted: Candidate
    policy: str
    held_s: float = 0.0
    """How long the request waited in the gateway's queue before it was bound."""
    num_candidates: int = 0
    """Ways to serve it that the policy weighed."""


class Outcome(StrEnum):
    """How a request ended, as the router needs to know it."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt to serve a request ended without an answer."""

    code: str
    worker: WorkerId | None
    """Who is to blame, if a worker is: the next attempt leaves it out."""
    reason: str


class Observed(msgspec.Struct, frozen=True):
    """What really happened to a request, for the latency model and for explain; None where it never came so far."""

    ttft_s: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    cached_tokens: int | None = None
    handover_s: float | None = None
    handover_bytes: int | None = None
    completion_tokens: int = 0
    outcome: Outcome = Outcome.FINISHED
    prefill: WorkerId | None = None
    """Who computed the prompt, if not who the route names: another worker may have taken it from the queue."""
    failure: Failure | None = None


class Explanation(msgspec.Struct):
    """Everything about one decision; served by `GET /v1/routes/{request_id}`."""

    request: RequestId
    policy: str
    prompt_tokens: int
    submitted_at: float
    """On the router's clock."""
    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None
    held_s: float = 0.0
    held_because: str = ""
    refused_because: str = ""
    observed: Observed | None = None
    shadow: Candidate | None = None
    handover: HandoverPreference = HandoverPreference.AUTO
    tenant: str = ""
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    """What it was to keep …"""
    slo_ttft_from: SloSource = SloSource.NOBODY
    slo_itl_from: SloSource = SloSource.NOBODY
    """… and who said so."""
    attempt: int = 1
    """Which attempt to serve the request this is: a retry or a migration is decided anew."""
    earlier: tuple["Explanation", ...] = ()
    """The attempts before, oldest first; of many the latest."""
    timeline: Timeline | None = None
    """Where its time went; None until it has ended."""
