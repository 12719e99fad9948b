"""What a second is worth that somebody else loses by a decision, in seconds of waiting for a first token.

**Standing still.** Every prompt that a worker computes stops the streams that decode there. A stall of s seconds uses
up s / (tokens * itl) of what a stream's SLO allows it, a wait of as many s / ttft of what a request's does. So a second
of stall costs

    ttft / (tokens * itl) * x / (1 - x)          x: the mean time between tokens there, of what it may be

seconds: next to nothing while streams are fast or long, much for a stream of a dozen tokens, and the more the less is
left. A stream that has lost its SLO cannot lose it again. Where nobody has said an SLO of streams, `CostModel` has one
in steps, and a second of stall costs a second at least: by so much the answer ends later, and nothing says that those
who wait for a first token are in a greater hurry.

**Congestion.** Workers share the gateway's queue, and an arrival waits only when all that it may go to are busy: with k
servers the wait grows with utilisation^n / (1 - utilisation), n = sqrt(2 k + 2) - 1 (Sakasegawa 1977). Cached prefixes
tie requests to some of the workers, so k is the root of their number. Where requests are waiting each second of work
delays those that wait for this worker by a second, and nobody else: where all wait for another one, it is free.
Utilisation is averaged over a minute and knows of no burst yet; the queue does at once.
"""

import math
from collections.abc import Mapping

import msgspec

from planes.wire.messages import WorkerId
from router.policy import NOBODY_KNOWS, FleetView, WorkerView
from router.request import RoutableRequest

_LOST = 0.95  # of what a stream may have: it will hardly keep its SLO


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """What steps cannot express (ADR 30); none is fitted to a load. What is not in seconds has no unit."""

    max_utilisation: float = 0.8
    """Busier than this is not told apart: there the queue is what tells."""
    pause_steps: float = 4.0
    """Decode steps without prompts: the longest pause of a stream on a worker kept for decoding and, where no SLO says
    otherwise, the mean time between tokens that is as bad as can be."""
    first_token_gaps: float = 100.0
    """Where no SLO says otherwise: a wait for the first token that is as bad, in such times between tokens."""
    round_trip_s: float = 0.01
    """From a worker's report to the next prompt's arrival there: work for so long has to lie ready."""
    sending_s: float = 0.001
    """A prompt's way through the gateway and into its worker, in CPU: of many that share a step the first are sent so
    much earlier."""
    patience: float = 4.0
    """How many times as long as it took to compute a KV cache may wait for room, unless its stream bears more."""
    sparing_share: float = 0.9
    """Of its time to the first token, so much may have passed at the predicted one of a request that spares streams."""
    near: float = 1.003
    """Costs this close are equal, and a random one wins: several gateways must not all pick the same worker."""


MEASURED = CostModel()


class Goals:
    """What an answer shall keep, in seconds. None: nobody has said.

    No struct, as `Congestion`: of a compiled class compiled code reads attributes ten times as fast.
    """

    def __init__(self, *, ttft_s: float | None = None, itl_s: float | None = None, makes_way: bool = False) -> None:
        self.ttft_s = ttft_s
        """The time to the first token from now on: what was waited is off."""
        self.itl_s = itl_s
        """The mean time between tokens, of its own stream and of those that it touches."""
        self.makes_way = makes_way
        """Its first token is late: it takes no room to decode from those that can still be in time."""

    @classmethod
    def of(cls, request: RoutableRequest, view: FleetView) -> "Goals":
        ttft_s = request.slo_ttft_s
        ttft_s = None if ttft_s is None else ttft_s - view.waited_s
        return cls(ttft_s=ttft_s, itl_s=request.slo_itl_s, makes_way=view.makes_way)


NO_GOALS = Goals()


class Congestion:
    """What a second of prompt work adds to the waits of others, in seconds, by how busy its worker is."""

    def __init__(
        self,
        *,
        num_waiting: float = 0.0,
        power: float = 1.0,
        shares: Mapping[WorkerId, float] = NOBODY_KNOWS,
        any_share: float = 1.0,
        found_busy: float = 1.0,
    ) -> None:
        self.num_waiting = num_waiting
        """Other requests in the gateway's queue."""
        self.power = power
        self.shares = shares
        """Of these, the share that waits for each worker."""
        self.any_share = any_share
        """The same, where nobody knows."""
        self.found_busy = found_busy
        """Of those that come, the share that finds others there, and no more than that can find its worker busy."""

    def price(self, worker: WorkerId, utilisation: float) -> float:
        """`utilisation`: 0.0 to less than 1."""
        waiting = self.num_waiting
        if waiting:
            waiting *= self.shares.get(worker, 0.0) if self.shares else self.any_share
        utilisation = min(utilisation, self.found_busy)
        if not utilisation:
            return waiting
        return max(float(utilisation**self.power) / (1 - utilisation), waiting)


NO_CONGESTION = Congestion()


def congestion(view: FleetView) -> Congestion:
    """The same for all workers of a view."""
    num_workers = view.num_computing
    return Congestion(
        num_waiting=max(0, view.num_waiting - 1),
        power=math.sqrt(2 * math.sqrt(num_workers) + 2) - 1,
        shares=view.waiting_shares,
        any_share=1 / num_workers,
        found_busy=view.found_busy,
    )


def stall_price(request: RoutableRequest, worker: WorkerView, step_s: float, busy: float, model: CostModel) -> float:
    """What a second of standing still costs a stream of `worker`. busy: the share of its time that goes to prompts."""
    itl_s = request.slo_itl_s or model.pause_steps * step_s
    ttft_s = request.slo_ttft_s or model.first_token_gaps * itl_s
    used = step_s / (1 - busy) / itl_s
    tokens = worker.mean_expected or request.expected_tokens
    price = ttft_s / (itl_s * tokens) * (used / (1 - used) if used < _LOST else 1.0)
    return price if price > 1 or request.slo_itl_s else 1.0
