"""What processes tell each other: registrations (etcd), KV events, load reports and snapshots (NATS).

Structs ignore unknown fields, so that a newer worker can talk to an older gateway. Counts of blocks and tokens are
per worker. Hashes travel packed: little-endian uint64, one per block (`planes/wire/blocks.py`).
"""

from enum import StrEnum
from typing import NewType

import msgspec

WorkerId = NewType("WorkerId", str)
RequestId = NewType("RequestId", str)
BlockHash = NewType("BlockHash", int)


class Role(StrEnum):
    """What a worker is for."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def can_prefill(self) -> bool:
        return self is not Role.DECODE

    @property
    def can_decode(self) -> bool:
        return self is not Role.PREFILL


class WorkerState(StrEnum):
    """Whether a worker takes new requests."""

    READY = "ready"
    DRAINING = "draining"


class HandoverMode(StrEnum):
    """Who moves the KV cache: the decode worker READs (pull) or the prefill worker WRITEs (push)."""

    PULL = "pull"
    PUSH = "push"


class LatencyPrior(msgspec.Struct, frozen=True):
    """A worker's own guess of its speed, until the router has learned better. All in seconds.

    prefill(u uncached of n prompt tokens) = prefill_fixed_s + prefill_per_token_s * u
                                             + prefill_per_pair_s * u * (n - u / 2)
    one decode step(batch, kv tokens)      = step_fixed_s + step_per_sequence_s * batch + step_per_kv_token_s * kv
    handover(bytes)                        = handover_fixed_s + bytes / handover_bytes_per_s
    """

    prefill_fixed_s: float = 0.01
    prefill_per_token_s: float = 1 / 8000
    prefill_per_pair_s: float = 2e-9
    step_fixed_s: float = 0.008
    step_per_sequence_s: float = 5e-5
    step_per_kv_token_s: float = 2e-8
    handover_fixed_s: float = 0.005
    handover_bytes_per_s: float = 4e9


class EngineFacts(msgspec.Struct, frozen=True):
    """What does not change while an engine runs."""

    block_size: int
    """Tokens per KV block."""
    num_blocks: int
    context_length: int
    """Most prompt plus completion tokens of one request."""
    max_batch: int
    """Most sequences running at once."""
    max_step_tokens: int
    """Most tokens that one engine step computes (the chunked-prefill budget)."""
    bytes_per_block: int
    """KV bytes that a handover moves per block."""
    vocab_size: int
    latency: LatencyPrior = LatencyPrior()
    is_shortest_first: bool = False
    """Whether a prompt shorter than what is left of those being computed is computed before them; else in turn."""


class HandoverEndpoint(msgspec.Struct, frozen=True):
    """Where a worker's KV cache can be reached. `mode` is what its engine was started with; both ends must agree."""

    mode: HandoverMode
    engine_id: str
    """New at every start: a restarted engine must never be mistaken for the one before."""
    host: str
    port: int
    tp_size: int = 1
    pp_size: int = 1


class Registration(msgspec.Struct, frozen=True):
    """A worker's entry in etcd, `/headrace/{namespace}/workers/{worker}`, as JSON under a lease."""

    worker: WorkerId
    epoch: int
    """New and larger at every start of the worker (nanoseconds since 1970 do)."""
    role: Role
    model: str
    """The name that clients use."""
    address: str
    """host:port of the worker's stream server."""
    engine: str
    """`vllm` or `sim`."""
    facts: EngineFacts
    card_digest: str
    """sha256 of the model card in the asset store (`planes/assets.py`)."""
    handover: HandoverEndpoint | None = None
    state: WorkerState = WorkerState.READY
    is_pulling: bool = False
    """Takes prefill jobs from the queue (`planes/work_queue.py`) when it has room."""
    layout: str = ""
    """Compatibility hash of its KV cache: engine, version, KV layout, dtype, block size, connector version. A handover
    needs equal ones at both ends; empty: unknown, and taken to fit."""


class BlocksStored(msgspec.Struct, frozen=True, tag="stored", array_like=True):
    """The worker now holds these full blocks, in prompt order. Storing a held block again changes nothing."""

    hashes: bytes


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed", array_like=True):
    """The worker no longer holds these blocks."""

    hashes: bytes


class AllCleared(msgspec.Struct, frozen=True, tag="cleared", array_like=True):
    """The worker dropped its whole prefix cache."""


KvEvent = BlocksStored | BlocksRemoved | AllCleared


class KvEvents(msgspec.Struct, frozen=True):
    """One publication on `headrace.{ns}.kv.{worker}`; `seq` counts publications of this epoch from 1."""

    worker: WorkerId
    epoch: int
    seq: int
    events: list[KvEvent]


class Snapshot(msgspec.Struct, frozen=True):
    """Every block a worker holds after publication `seq`: the reply on `headrace.{ns}.snapshot.{worker}`."""

    worker: WorkerId
    epoch: int
    seq: int
    hashes: bytes


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step computed and how long it took.

    prefill_tokens: prompt tokens computed.  prefill_pairs: (query, key) pairs those tokens attended to.
    batch: sequences that decoded one token.  kv_tokens: context tokens those sequences hold.
    """

    prefill_tokens: int
    prefill_pairs: int
    batch: int
    kv_tokens: int
    duration_s: float


class LoadReport(msgspec.Struct, frozen=True):
    """Publication on `headrace.{ns}.load.{worker}`: every 100 ms while busy, every second while idle."""

    worker: WorkerId
    epoch: int
    state: WorkerState
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    """Prompt tokens accepted and not computed yet, of waiting and of running requests."""
    free_blocks: int
    """Blocks that a new request could get, cached but unreferenced ones included."""
    kv_tokens: int
    """Context tokens of the running sequences."""
    seq: int
    """Last KV publication of this epoch; 0 before the first."""
    num_cached: int
    """Blocks held, as published."""
    digest: int
    """XOR of the hashes of all blocks held after publication `seq`."""
    steps: list[StepSample] = []
    """Engine steps since the last report, newest last, at most 256."""
