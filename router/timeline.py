"""Where one request's time went, told once at its end; kept beside its explanation (`router/decision_log.py`)."""

from enum import StrEnum

import msgspec

from planes.wire.messages import RequestId, WorkerId


class StageKind(StrEnum):
    """What a request was in. One attempt's come in this order, each at most once."""

    PREPARE = "prepare"
    """Reading, checking and tokenizing it. Once, before the first attempt."""
    QUEUE = "queue"
    """It had no route: it waited in the gateway, or after a failure for a worker to go on with."""
    WAIT = "wait"
    """It had a route, and its prompt was not begun yet: the way to the worker, and the worker's own queue."""
    PREFILL = "prefill"
    HANDOVER = "handover"
    DECODE = "decode"


class Stage(msgspec.Struct, frozen=True, gc=False):
    """One stretch of time, in seconds since the request came.

    worker: which worker was at it; of a handover the one that takes the KV cache, and `source` the one that gives it.
    tokens: computed (prefill) or generated (decode).  cached_tokens: of the prompt, found and not computed (prefill).
    """

    kind: StageKind
    attempt: int
    begin_s: float
    end_s: float
    worker: WorkerId | None = None
    source: WorkerId | None = None
    tokens: int = 0
    cached_tokens: int = 0
    num_bytes: int = 0


class Interruption(msgspec.Struct, frozen=True, gc=False):
    """An attempt that failed. is_migration: the client had tokens, and its answer went on elsewhere if it could."""

    attempt: int
    at_s: float
    code: str
    worker: WorkerId | None
    """Which worker is to blame, if one is."""
    is_migration: bool


class Timeline(msgspec.Struct, frozen=True):
    """One ended request. Seconds are since it came; None where it never got so far."""

    request: RequestId
    model: str
    received_at: float
    """On the router's clock."""
    end_s: float
    code: str
    """`ok`, `cancelled`, or the code of its error."""
    policy: str = ""
    prefill: WorkerId | None = None
    """Which worker computed the prompt, in the last attempt."""
    decode: WorkerId | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: float | None = None
    itl_s: float | None = None
    """Mean gap between two tokens."""
    overhead_s: float = 0.0
    """What the gateway took itself, before the first worker was asked; without its router's queue."""
    stages: tuple[Stage, ...] = ()
    """In order of time; they overlap only where a handover by push does."""
    interruptions: tuple[Interruption, ...] = ()
