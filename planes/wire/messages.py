"""What processes tell each other: registrations (etcd), KV events, load reports, snapshots, requests bound (NATS).

Structs ignore unknown fields, so that a newer worker can talk to an older gateway. Counts of blocks and tokens are
per worker. Hashes travel packed: little-endian uint64, one per block (`planes/wire/blocks.py`).

Every field has its range here: what decodes is valid, and nobody checks it again. Numbers that pass can be added up,
multiplied with each other and divided by without a thought.
"""

from enum import StrEnum
from typing import Annotated, Final, NewType

import msgspec
from msgspec import Meta

WorkerId = NewType("WorkerId", str)
RequestId = NewType("RequestId", str)
BlockHash = NewType("BlockHash", int)

Count = Annotated[int, Meta(ge=0, le=1 << 48)]
"""Tokens, blocks, bytes or requests."""
Positive = Annotated[int, Meta(ge=1, le=1 << 32)]
Sequence = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""A number that only grows: nanoseconds since 1970, or a count of publications."""
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Port = Annotated[int, Meta(ge=1, le=65535)]
WorkerName = Annotated[WorkerId, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")]
GatewayName = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
"""Drawn anew at each start."""
RequestName = Annotated[RequestId, Meta(min_length=1, max_length=256)]
ModelName = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,256}\Z")]
"""Any text of one line, without control characters: it stands in logs and on terminals."""
Address = Annotated[str, Meta(pattern=r"^[^\s\x00-\x1f\x7f-\x9f/]{1,255}:[0-9]{1,5}\Z")]
"""host:port, or [host]:port."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:+-]{0,128}\Z")]
SIMULATED: Final = "sim"
"""A worker's `engine` that computes nothing."""
ADOPTED: Final = "adopted"
"""A worker's `engine` that is a server of somebody else's (`workers/adopted/`)."""
OWN_TOKENS = "own_tokens"
"""Lacking it, an engine takes tokens that it goes on from for a part of the prompt: see `frames.needs_own_tokens`."""
THINKING_BUDGET = "thinking_budget"
"""Lacking it, an engine ends no reasoning after so many tokens."""


def _check_packed(hashes: bytes) -> None:
    if len(hashes) % 8:
        raise ValueError(f"{len(hashes)} bytes of packed hashes; they come in eights")


class Role(StrEnum):
    """What a worker is for."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    def __init__(self, value: str) -> None:
        self.can_prefill = value != "decode"
        self.can_decode = value != "prefill"


class WorkerState(StrEnum):
    """Whether a worker takes new requests."""

    READY = "ready"
    DRAINING = "draining"


class RoleWish(msgspec.Struct, frozen=True):
    """What a running worker is asked to be: `/headrace/{namespace}/roles/{worker}` in etcd, as JSON."""

    epoch: Sequence
    """Of the life that it is meant for."""
    role: Role
    migrate_after_s: Seconds | None = None
    """After so long what it will not do any more goes on elsewhere; None: it ends here, whatever time that takes."""
    is_pin: bool = True
    """Whether it shall keep this role until it is asked again by hand: `--autorole` leaves it alone."""


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

    prefill_fixed_s: Seconds = 0.01
    prefill_per_token_s: Seconds = 1 / 8000
    prefill_per_pair_s: Seconds = 2e-9
    step_fixed_s: Seconds = 0.008
    step_per_sequence_s: Seconds = 5e-5
    step_per_kv_token_s: Seconds = 2e-8
    handover_fixed_s: Seconds = 0.005
    handover_bytes_per_s: Annotated[float, Meta(ge=1, le=1e18)] = 4e9


class EngineFacts(msgspec.Struct, frozen=True):
    """What does not change while an engine runs."""

    block_size: Annotated[int, Meta(ge=1, le=1 << 16)]
    """Tokens per KV block."""
    num_blocks: Positive
    context_length: Positive
    """Most prompt plus completion tokens of one request."""
    max_batch: Positive
    """Most sequences running at once."""
    max_step_tokens: Positive
    """Most tokens that one engine step computes (the chunked-prefill budget)."""
    bytes_per_block: Count
    """KV bytes that a handover moves per block."""
    vocab_size: Positive
    latency: LatencyPrior = LatencyPrior()
    embedding_size: Count = 0
    """Numbers in the vectors that it makes of prompts; 0: it generates."""
    is_matryoshka: bool = False
    """Whether a vector's first numbers are one by themselves."""
    matryoshka_dimensions: tuple[Positive, ...] = ()
    """If so: how many of them; none: any number."""
    is_shortest_first: bool = False
    """Whether a prompt shorter than what is left of those being computed is computed before them; else in turn."""
    lacks: Annotated[tuple[Word, ...], Meta(max_length=32)] = ()
    """What it cannot do and gateways must not ask of it: `OWN_TOKENS`, `THINKING_BUDGET`; other words say nothing."""


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA adapter that clients address as a model: `/headrace/{namespace}/adapters/{name}` in etcd, as JSON."""

    name: ModelName
    parent: ModelName
    """The model that it changes."""
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """Its directory, on every worker of that model."""
    number: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
    """New at each load: what another load of this name has left in caches is not this one's."""
    created: Count = 0
    """Seconds since 1970."""

    @property
    def tag(self) -> str:
        """What names its blocks, beside model and salt."""
        return f"{self.name}@{self.number}"


class HandoverEndpoint(msgspec.Struct, frozen=True):
    """Where a worker's KV cache can be reached. `mode` is what its engine was started with; both ends must agree."""

    mode: HandoverMode
    engine_id: Annotated[str, Meta(max_length=256)]
    """New at every start: a restarted engine must never be mistaken for the one before."""
    host: Annotated[str, Meta(max_length=255)]
    port: Port
    tp_size: Positive = 1
    pp_size: Positive = 1


class Registration(msgspec.Struct, frozen=True):
    """A worker's entry in etcd, `/headrace/{namespace}/workers/{worker}`, as JSON under a lease."""

    worker: WorkerName
    epoch: Sequence
    """New and larger at every start of the worker (nanoseconds since 1970 do)."""
    role: Role
    model: ModelName
    """The name that clients use."""
    address: Address
    """Of the worker's stream server."""
    engine: Word
    """`vllm`, `sim` or `adopted`."""
    facts: EngineFacts
    card_digest: Sha256
    """sha256 of the model card in the asset store (`planes/assets.py`)."""
    handover: HandoverEndpoint | None = None
    state: WorkerState = WorkerState.READY
    is_pulling: bool = False
    """Takes prefill jobs from the queue (`planes/work_queue.py`) when it has room."""
    layout: str = ""
    """Compatibility hash of its KV cache: engine, version, KV layout, dtype, block size, connector version. A handover
    needs equal ones at both ends; empty: unknown, which fits the unknown alone."""
    rendering: Annotated[str, Meta(max_length=64)] = ""
    """Digest of the probes (`planes/probes.py`) as its own code renders and tokenizes them; empty: it does not know."""
    roles: tuple[Role, ...] = ()
    """What it can be while it runs; empty: nothing but what it is."""
    becoming: Role | None = None
    """The role that it takes as soon as it has ended what it will not do any more; None: it keeps its role."""
    is_pinned: bool = False
    """Its role was asked for by hand (`RoleWish.is_pin`)."""
    adapters: Annotated[
        dict[Annotated[int, Meta(ge=1, le=(1 << 31) - 1)], Annotated[str, Meta(max_length=1000)]], Meta(max_length=1024)
    ] = {}
    """By their numbers, those that it was asked to load: empty if it has, else why it could not."""

    @property
    def takes_prompts(self) -> bool:
        """Whether its role, present and future, has prompts sent to it."""
        return self.role.can_prefill and (self.becoming is None or self.becoming.can_prefill)

    @property
    def takes_answers(self) -> bool:
        """The same for answers to decode."""
        return self.role.can_decode and (self.becoming is None or self.becoming.can_decode)

    @property
    def takes(self) -> Role | None:
        """What new requests find here: its role without what it gives up; None: nothing."""
        if self.takes_answers:
            return Role.BOTH if self.takes_prompts else Role.DECODE
        return Role.PREFILL if self.takes_prompts else None


class BlocksStored(msgspec.Struct, frozen=True, tag="stored", array_like=True):
    """The worker now holds these full blocks, in prompt order. Storing a held block again changes nothing."""

    hashes: bytes

    def __post_init__(self) -> None:
        _check_packed(self.hashes)


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed", array_like=True):
    """The worker no longer holds these blocks."""

    hashes: bytes

    def __post_init__(self) -> None:
        _check_packed(self.hashes)


class AllCleared(msgspec.Struct, frozen=True, tag="cleared", array_like=True):
    """The worker dropped its whole prefix cache."""


KvEvent = BlocksStored | BlocksRemoved | AllCleared


class KvEvents(msgspec.Struct, frozen=True):
    """One publication on `headrace.{ns}.kv.{worker}`; `seq` counts publications of this epoch from 1."""

    worker: WorkerId
    epoch: Sequence
    seq: Sequence
    events: list[KvEvent]


class Snapshot(msgspec.Struct, frozen=True):
    """Every block a worker holds after publication `seq`: the reply on `headrace.{ns}.snapshot.{worker}`."""

    worker: WorkerId
    epoch: Sequence
    seq: Sequence
    hashes: bytes

    def __post_init__(self) -> None:
        _check_packed(self.hashes)


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step computed and how long it took.

    prefill_tokens: prompt tokens computed.  prefill_pairs: (query, key) pairs those tokens attended to.
    batch: sequences that decoded one token.  kv_tokens: context tokens those sequences hold.
    """

    prefill_tokens: Count
    prefill_pairs: Annotated[int, Meta(ge=0)]
    batch: Count
    kv_tokens: Count
    duration_s: Seconds


class LoadReport(msgspec.Struct, frozen=True):
    """Publication on `headrace.{ns}.load.{worker}`: every 100 ms while busy, every second while idle."""

    worker: WorkerId
    epoch: Sequence
    state: WorkerState
    num_running: Count
    num_waiting: Count
    waiting_prefill_tokens: Count
    """Prompt tokens accepted and not computed yet, of waiting and of running requests."""
    free_blocks: Count
    """Blocks that a new request could get, cached but unreferenced ones included."""
    kv_tokens: Count
    """Context tokens of the running sequences."""
    seq: Sequence
    """Last KV publication of this epoch; 0 before the first."""
    num_cached: Count
    """Blocks held, as published."""
    digest: Annotated[int, Meta(ge=0)]
    """XOR of the hashes of all blocks held after publication `seq`."""
    steps: Annotated[list[StepSample], Meta(max_length=256)] = []
    """Engine steps since the last report, newest last, at most 256."""


class RequestBound(msgspec.Struct, frozen=True, tag="bound", array_like=True):
    """A gateway has sent a request to workers: what another one needs to count it as its own.

    prefill: None: `decode` computes its prompt.  due_in_s: seconds until its prompt has to be computed, for its first
    token to be in time; None: whenever.  is_prefilled: it is computed.  age_s: seconds since its decode leg arrived, or
    since it was bound where that has not. Clocks differ, so times are told from now on.
    """

    request: RequestName
    prefill: WorkerName | None
    decode: WorkerName
    prompt_tokens: Count
    uncached_tokens: Count
    decode_cached_tokens: Count
    expected_tokens: Count
    slo_itl_s: Seconds | None
    due_in_s: Annotated[float, Meta(ge=-1e6, le=1e6)] | None
    is_prefilled: bool = False
    age_s: Seconds = 0.0

    def __post_init__(self) -> None:
        if max(self.uncached_tokens, self.decode_cached_tokens) > self.prompt_tokens:
            raise ValueError(f"more tokens computed or cached than the prompt's {self.prompt_tokens}")


class RequestPrefilled(msgspec.Struct, frozen=True, tag="prefilled", array_like=True):
    """Its prompt is computed."""

    request: RequestName


class RequestReleased(msgspec.Struct, frozen=True, tag="released", array_like=True):
    """It has ended, after so many tokens, however it ended."""

    request: RequestName
    completion_tokens: Count


RequestNews = RequestBound | RequestPrefilled | RequestReleased


class GatewayNews(msgspec.Struct, frozen=True):
    """Publication on `headrace.{ns}.gateway.{gateway}`; `seq` counts those of this gateway's start from 1.

    is_whole: forget what was told before; this and what follows is everything.  hears: of which other gateways it has
    missed nothing; told once a second.
    """

    gateway: GatewayName
    seq: Sequence
    news: Annotated[list[RequestNews], Meta(max_length=1024)] = []
    is_whole: bool = False
    hears: Annotated[list[GatewayName], Meta(max_length=1024)] | None = None
