"""What a routing policy sees and answers. A policy is a class with `choose`; `router/policies/` has one a file."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, NewType, Protocol

import msgspec

from planes.wire.messages import EngineFacts, Role, WorkerId
from router.latency import LatencyModel, LinkModel
from router.request import Candidate, RoutableRequest

HandoverGroup = NewType("HandoverGroup", str)
"""Workers whose KV caches fit each other. An opaque name, made in `router/worker.py`."""


class WorkerView(msgspec.Struct, frozen=True, gc=False):
    """One worker, as it looks to one request now. Load counts the last report plus this gateway's dispatches since.

    Every decision builds hundreds: a msgspec struct takes a sixth of the time that a dataclass takes by keyword, and
    what is in no cycle need not be looked at by the garbage collector.
    """

    # The first twelve go by position: with more than fifteen keywords CPython makes a dictionary of them for each call,
    # which takes five times as long and more.

    worker: WorkerId
    role: Role
    facts: EngineFacts
    latency: LatencyModel
    handover: HandoverGroup | None
    """With whom it can pair: those of the same group; None: with nobody."""
    cached_tokens: int
    """Leading prompt tokens of this request held here: whole blocks, less than the prompt."""
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    """Prompt tokens accepted and not computed yet."""
    queue_s: float
    """Predicted seconds until a prompt sent now would begin to be computed."""
    kv_tokens: int
    """Context tokens of the sequences that decode here, reserved ones included."""
    free_blocks: int
    utilisation: float
    """Share of the last minute spent computing, 0.0 to 1.0 (exponentially weighted)."""
    prefill_utilisation: float = 0.0
    """Share of the last minute spent on prompts alone."""
    mean_running: float = 0.0
    """Sequences that decoded here over the last minute, on average."""
    num_passed: int = 0
    """Prompts here that this one, because it is shorter, would be computed before."""
    starts_in_s: float = 0.0
    """Where `num_passed` is not 0: predicted seconds until this prompt would begin, less than `queue_s`."""
    num_cached: int = 0
    """Blocks held here in all, of whichever prompts."""
    without_room: int = 0
    """Requests in the gateway, before this one, that wait for room to decode here."""
    num_streams: int = 0
    """Of `num_running`, those that decode now."""
    mean_expected: float = 0.0
    """Tokens that the streams here are expected to have in the end, on average; 0: there are none."""
    keeps_s: float = math.inf
    """So long a KV cache may wait here for the worker that shall take it."""
    stall_left_s: float = math.inf
    """For so long the streams here may still stand still, until one of them misses its time between tokens."""
    shared_tokens: int = 0
    """Prompt tokens that are in the step already in which this one would begin …"""
    shared_s: float = 0.0
    """… their work …"""
    num_sharing: int = 0
    """… and the prompts that they belong to."""
    late_in_s: float = math.inf
    """So much later that step may end, until the first token of one of these comes later than its SLO has it."""
    seat_in_s: float | None = None
    """Predicted seconds until a place in the batch is free, after those `without_room`; None: nobody knows."""

    def busy_because(self, max_backlog_s: float) -> str:
        """Why a prompt bound now would start no sooner than one bound later; empty: no more lies before it than may."""
        if self.num_passed or self.queue_s <= max_backlog_s:
            return ""
        return f"{self.worker} has {self.queue_s:.2f} s to compute"


NOBODY_KNOWS: Mapping[WorkerId, float] = {}
"""Who waits for which worker."""


class Hopeful(NamedTuple):
    """Requests with an SLO that wait and can still be in time."""

    num: int
    uncached_tokens: float
    """Of one, on average …"""
    work_s: float
    """… and how long they take."""


NOBODY_HOPES: Final = Hopeful(0, 0.0, 0.0)


class FleetView(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The workers that may serve a request; a worker of role `both` stands in both lists. Never empty in `decode`."""

    prefill: Sequence[WorkerView]
    decode: Sequence[WorkerView]
    links: "Links"
    now: float
    rng: random.Random
    num_waiting: int = 0
    """Requests in this gateway's queue, this one included."""
    waited_s: float = 0.0
    """How long this one has been there."""
    hopeful: Hopeful = NOBODY_HOPES
    """Of those in the queue."""
    makes_way: bool = False
    """It can no longer be in time, and takes no room to decode from those that can …"""
    lets_pass: bool = False
    """… nor, for a shorter time, what streams need to keep their SLOs."""
    waiting_shares: Mapping[WorkerId, float] = NOBODY_KNOWS
    """Of those in the queue, the share that waits for each worker to compute their prompts; empty: nobody knows."""
    found_busy: float = 1.0
    """Of the last requests that came, the share that found others there: a single client at a time keeps a worker busy
    and nobody waiting."""

    @property
    def num_computing(self) -> int:
        """Workers that prompts may be computed on."""
        return max(1, len(self.prefill) or len(self.decode))


class Links(Protocol):
    """Handover speeds, learned per pair."""

    def link(self, prefill: WorkerId, decode: WorkerId) -> LinkModel:
        """Never fails: an unknown pair answers with the priors."""


class Choice(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A policy's answer. `candidates` holds what it weighed (for explain), of many the cheapest at least,
    and all where it holds the request; `chosen` is one of them.

    `is_held`: the chosen worker is the right one but has enough to do; ask again when its `queue_s` has come down to
    `max_backlog_s`, or when another worker looks cheaper.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    is_held: bool = False
    held_because: str = ""
    max_backlog_s: float = 0.0
    lacks_room: bool = False
    """It is held for room to decode, which comes when a request ends."""
    spares_streams: bool = False
    """It is held so that streams keep their SLOs, which end sooner or later."""
    makes_way_because: str = ""
    """Why those that wait should go before it, once; empty: they should not."""


class Policy(Protocol):
    """Decides where a request goes. Stateless but for what it keeps in `self`; deterministic given `view.rng`.

    It is asked when a request could be bound, again if it held it back, and once as a shadow. Previews ask a deep copy.
    """

    name: str

    def choose(self, request: RoutableRequest, view: FleetView) -> Choice:
        """Pick one way to serve `request`. Pure: reserving is the router's part."""
