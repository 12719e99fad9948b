"""What gateways and workers tell each other about jobs of the prefill queue: msgpack over NATS.

    gateway  ── QueuedPrefill ──► JetStream ──► one prefill worker at a time
             ◄── PrefillNews ────────────────── taken; at the end Done with its ticket, or Failed
             ── PrefillUnwanted ──────────────► all workers of the model: nobody waits for this job any more

A job may be computed twice (its worker was slow to say that it lives): the first answer counts.
"""

import msgspec

from planes.wire.frames import Done, Failed, Generate
from planes.wire.messages import RequestId, WorkerId

OVERTRIED = "prefill_queue_overtried"
"""Code of the failure of a job that too many workers have taken and none has finished."""


class QueuedPrefill(msgspec.Struct, frozen=True):
    """A job: run this prefill leg. `generate.timeout_s` counts from when the job was stored."""

    generate: Generate
    answer_to: str
    """Subject for PrefillNews."""


class PrefillNews(msgspec.Struct, frozen=True):
    """A worker has taken a job, or ended it: then exactly one of `done` and `failed` is there."""

    job: RequestId
    model: str
    worker: WorkerId
    is_last_try: bool = False
    """Nobody else computes the job if this worker dies."""
    done: Done | None = None
    failed: Failed | None = None


class PrefillUnwanted(msgspec.Struct, frozen=True):
    """Drop the job, stop computing it, give up the KV cache kept for it."""

    job: RequestId
    worker: WorkerId | None = None
    """Only this worker shall; None: all."""
