"""What the router counts, and what it tells of itself and its workers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from planes.wire.messages import LatencyPrior, Role, WorkerId, WorkerState
from router.fairness import Fairness
from router.request import Candidate, Observed

_ERROR_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class ShadowStats:
    """How a policy that is asked and not obeyed compares."""

    policy: str
    decided: int
    differed: int
    """Decisions with another prefill or decode worker."""
    faster_s: float
    """Predicted seconds to the first token that it would have saved where it differed, summed; negative: lost."""
    failed: int
    """How often it raised."""


@dataclass(frozen=True, slots=True)
class RouterStats:
    """For metrics. Labels: classes, policies, error codes and workers."""

    waiting: Mapping[int, int]
    """Requests in the queue per priority class."""
    oldest_wait_s: float
    bound: int
    """Requests that hold a reservation …"""
    peers_bound: int
    """… and those of other gateways."""
    index_blocks: int
    """Blocks in the index, summed over the workers that hold them."""
    index_fallback: str
    """Why the index is plain Python; empty: it is compiled."""
    inexact_workers: int
    """Workers whose blocks need a snapshot."""
    decisions: Mapping[str, int]
    """Requests bound per policy since the start."""
    local_decisions: int
    """Those bound without a handover."""
    refusals: Mapping[str, int]
    """Requests refused per `code`."""
    held: int
    """Requests that were held back at least once."""
    prefill_error_ratio: float
    """Mean |predicted - measured| / measured of the latency model, over the workers; so are the next three."""
    step_error_ratio: float
    handover_error_ratio: float
    ttft_error_ratio: float
    shadow: ShadowStats | None
    fairness: Fairness


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the router sees it, for `GET /v1/fleet` and metrics."""

    worker: WorkerId
    role: Role
    model: str
    state: WorkerState
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    queue_s: float
    kv_tokens: int
    free_blocks: int
    num_blocks: int
    indexed_blocks: int
    is_exact: bool
    utilisation: float
    speed: float
    """Recent slowdown against the learned coefficients; 1 is none."""
    reported_s: float | None
    """Age of the last load report; None: there was none."""
    latency: LatencyPrior
    """What has been learned of its speed, `speed` included; handovers: of all it has given."""
    num_samples: int
    """Engine steps or prefills that this was learned from; 0: it is the worker's own guess."""


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """What has been learned of handovers between two workers, for `GET /v1/fleet`."""

    prefill: WorkerId
    decode: WorkerId
    fixed_s: float
    bytes_per_s: float
    error_ratio: float
    """Mean of |predicted - measured| / measured over the last ones."""


@dataclass(slots=True)
class Counts:
    """Running totals behind `RouterStats`."""

    decisions: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    local: int = 0
    held: int = 0
    ttft_error_ratio: float = 0.0
    shadow_decided: int = 0
    shadow_differed: int = 0
    shadow_failed: int = 0
    shadow_faster_s: float = 0.0

    def observe(self, predicted: Candidate, observed: Observed) -> None:
        if observed.ttft_s is not None and observed.ttft_s > 0:
            error = min(abs(predicted.ttft_s - observed.ttft_s) / observed.ttft_s, 10.0)
            self.ttft_error_ratio += _ERROR_GAIN * (error - self.ttft_error_ratio)

    def compare(self, chosen: Candidate, shadow: Candidate) -> None:
        self.shadow_decided += 1
        if (shadow.prefill, shadow.decode) != (chosen.prefill, chosen.decode):
            self.shadow_differed += 1
            self.shadow_faster_s += chosen.ttft_s - shadow.ttft_s

    def forget_shadow(self) -> None:
        self.shadow_decided = self.shadow_differed = self.shadow_failed = 0
        self.shadow_faster_s = 0.0
