"""What a simulation is run with: fleet, wiring and faults."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from app.serving.retries import ExchangeLimits
from planes.streams.protocol import StreamLimits
from planes.wire.messages import EngineFacts, LatencyPrior, Role, WorkerId

MODEL: Final = "simulated"


def engine_facts(
    *,
    block_size: int,
    num_blocks: int,
    link_gbps: float,
    prefill_tokens_per_s: float = 8000.0,
    step_s: float = 0.008,
    max_batch: int = 128,
    max_step_tokens: int = 2048,
    is_shortest_first: bool = False,
) -> EngineFacts:
    """A worker of the simulated fleet: an 8B model (128 KiB of KV cache per token) on hardware of this speed.

    A faster one is faster in everything: attention takes as large a part of a prompt's time, sequences and their
    context as large a part of a step's.
    """
    standard = LatencyPrior()
    per_token_s, longer = 1 / prefill_tokens_per_s, step_s / standard.step_fixed_s
    speed = LatencyPrior(
        prefill_fixed_s=standard.prefill_fixed_s * longer,
        prefill_per_token_s=per_token_s,
        prefill_per_pair_s=standard.prefill_per_pair_s * (per_token_s / standard.prefill_per_token_s),
        step_fixed_s=step_s,
        step_per_sequence_s=standard.step_per_sequence_s * longer,
        step_per_kv_token_s=standard.step_per_kv_token_s * longer,
        handover_bytes_per_s=link_gbps * 1e9 / 8,
    )
    return EngineFacts(
        block_size=block_size,
        num_blocks=num_blocks,
        context_length=min(200_000, num_blocks * block_size - 1),
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        bytes_per_block=block_size * 128 * 1024,
        vocab_size=256,
        latency=speed,
        is_shortest_first=is_shortest_first,
    )


@dataclass(frozen=True, slots=True)
class Kill:
    """At an instant of the run, a worker's process is gone. worker: None picks one that lives."""

    at_s: float
    worker: WorkerId | None = None


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong.

    kills: at given instants.  kill_every_s: one more that often, at random workers, while requests are under way.
    restart_s: seconds from a kill until the worker registers anew, with an empty KV cache and another epoch.
    busy_share: of all legs, those that their worker refuses with `worker_busy`.
    """

    kills: Sequence[Kill] = ()
    kill_every_s: float | None = None
    restart_s: float = 30.0
    busy_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """A handover takes `fixed_s`, after its turn at the giver's network and bytes / `bytes_per_s` there."""

    fixed_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fleet and its router."""

    policy: str
    num_prefill: int
    num_decode: int
    num_both: int
    facts: EngineFacts
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    """What the routers are told to keep; nobody is refused for it."""
    seed: int = 0
    num_gateways: int = 1
    slow_worker: float = 1.0
    """The first worker takes this many times as long for everything; nobody tells the router."""
    hop_s: float = 0.0005
    """Gateway to worker or back."""
    publish_s: float = 0.002
    """KV events, load reports and registrations under way."""
    dead_s: float = StreamLimits().dead_s
    """Silence after which a worker counts as dead, for gateways and for readers of its KV cache: no socket tells that
    it was killed.
    """
    lease_s: float = 30.0
    """How long a prefilled KV cache waits to be fetched."""
    limits: ExchangeLimits = field(default_factory=ExchangeLimits)
    faults: Faults = field(default_factory=Faults)
    drain_s: float = 3600.0
    """The run ends this long after the last session's start; what is not finished by then counts as unfinished."""

    own_facts: Mapping[WorkerId, EngineFacts] = field(default_factory=dict)
    """Of workers that are not as `facts` says; blocks are equal everywhere."""
    own_links: Mapping[tuple[WorkerId, WorkerId], Link] = field(default_factory=dict)
    """Giver and taker → their link, where it is not as the giver's facts say."""

    def facts_of(self, worker: WorkerId) -> EngineFacts:
        return self.own_facts.get(worker, self.facts)

    def link(self, giver: WorkerId, taker: WorkerId) -> Link:
        speed = self.facts_of(giver).latency
        return self.own_links.get((giver, taker)) or Link(speed.handover_fixed_s, speed.handover_bytes_per_s)

    def workers(self) -> list[tuple[WorkerId, Role]]:
        roles = [Role.PREFILL] * self.num_prefill + [Role.DECODE] * self.num_decode + [Role.BOTH] * self.num_both
        return [(WorkerId(f"{role}-{number:03}"), role) for number, role in enumerate(roles)]

    def rng(self, what: str) -> random.Random:
        """Numbers of their own for each purpose: one more draw here changes nothing elsewhere."""
        return random.Random(f"{self.seed}/{what}")
