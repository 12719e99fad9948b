"""The gateway's queue: who is next, who has waited too long.

Order of service, first rule first:

1. Priority class, the lower the sooner, negative ones too. A request counts one class higher after each
   `promote_after_s`, up to class 0, or to the first class in which anybody waits: nobody starves.
2. Within a class, deficit round robin between tenants (Shreedhar, Varghese: Efficient fair queueing using deficit round
   robin, SIGCOMM 1995), in uncached prompt tokens: each round gives every tenant `quantum_tokens`; a request is due in
   the first round in which its tenant has saved enough for it and for all before it.
3. Within a tenant's round, who is due first, a second of predicted prefill counting like `1 / aging` seconds: so
   `predicted + aging * due_at` is a key that never changes by itself. A request is due when its SLO says
   (`slo_ttft_s`), without one after `promote_after_s`. One that can no longer be in time makes way for those that can,
   as if it were due `late_s` later; then it is its turn whatever comes, but for room to decode: that it leaves to
   them for as long as its whole answer may take besides.

A request leaves by being bound, withdrawn or expired. Everything here is O(log n) in requests or O(1), the walk apart.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from planes.wire.messages import RequestId, WorkerId
from router.policy import NOBODY_HOPES, Hopeful
from router.request import Explanation, RoutableRequest
from router.settings import RouterSettings

_MAX_SAVED_ROUNDS = 8
"""A tenant whose requests wait for a certain worker saves up no more than this."""


@dataclass(slots=True)
class Bids:
    """What each worker asks for a request that was held: seconds without the worker's queue and the step that it would
    join, and of prompt work.

    Row numbers of workers hold for one `version` of the dispatch.
    """

    version: int
    made_at: float
    rows: Sequence[int]
    own_s: Sequence[float]
    """Costs without what others who wait lose by it, which changes with them."""
    work_s: Sequence[float]
    max_backlog_s: float
    arrays: tuple[npt.NDArray[np.intp], npt.NDArray[np.float64], npt.NDArray[np.float64]] | None
    """The three once more, of many workers."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue."""

    request: RoutableRequest
    submitted_at: float
    uncached_tokens: int
    prefill_s: float
    """Shortest predicted prefill."""
    explanation: Explanation
    number: int
    level: int
    """Its class now: `request.priority`, less one for each promotion."""
    level_since: float
    """When it came into that class."""
    due_at: float = 0.0
    """By when it should have its first token; `late_s` more once it can no longer be in time."""
    is_late: bool = False
    is_rising: bool = False
    """A promotion is planned."""
    bids: Bids | None = None
    blocked: int = -1
    """Number of room changes there had been when it last lacked room to decode …"""
    blocked_by: WorkerId | None = None
    """… at this worker."""
    spares_streams: bool = False
    """It was last held so that streams keep their SLOs."""
    round: int = -1
    """Of walks: in which it was last asked about and held for room or for streams."""
    key: float = 0.0

    def makes_way(self, now: float) -> bool:
        """It can no longer be in time, and does not take room from those that can until it has waited `late_s` more,
        and for as long as its whole answer might have taken.
        """
        request = self.request
        return self.is_late and now < self.due_at + (request.slo_itl_s or 0.0) * request.expected_tokens

    def lets_pass(self, now: float) -> bool:
        """It can no longer be in time, is not somebody's answer in its midst, and has not waited `late_s` more."""
        return self.is_late and not self.request.is_retry and now < self.due_at


@dataclass(slots=True)
class _Tenant:
    """One tenant's requests of one class, sorted. `spent`: tokens bound since `joined`, the round of its first."""

    joined: int
    spent: int = 0
    line: list[Waiting] = field(default_factory=list)


@dataclass(slots=True)
class _Level:
    """One priority class. `round`: deficit rounds begun."""

    round: int = 0
    tenants: dict[str, _Tenant] = field(default_factory=dict)


class Queue:
    """Waiting requests of one gateway; its bound is the router's to keep."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._waiting: dict[RequestId, Waiting] = {}
        self._levels: dict[int, _Level] = {}
        self._deadlines: list[tuple[float, int, Waiting]] = []
        self._promotions: list[tuple[float, int, Waiting]] = []
        self._hopes: list[tuple[float, int, Waiting]] = []
        """When each must be computed at the latest to be in time."""
        self._number = 0
        self._num_hopeful, self._hopeful_tokens, self._hopeful_s = 0, 0, 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._waiting

    def only(self) -> Waiting | None:
        """The one that waits; None: nobody does, or more than one."""
        return next(iter(self._waiting.values())) if len(self._waiting) == 1 else None

    def get(self, request: RequestId) -> Waiting | None:
        return self._waiting.get(request)

    def configure(self, settings: RouterSettings) -> None:
        """Everybody's place and next promotion become what the new settings make of them; O(n log n)."""
        before, self._settings = self._settings, settings
        for level in self._levels.values():
            for tenant in level.tenants.values():  # what it has saved or owes in tokens stays what it is
                tenant.spent += (level.round - tenant.joined) * (settings.quantum_tokens - before.quantum_tokens)
                for waiting in tenant.line:
                    if waiting.request.slo_ttft_s is None:
                        waiting.due_at += settings.promote_after_s - before.promote_after_s
                    if waiting.is_late:
                        waiting.due_at += settings.late_s - before.late_s
                    waiting.key = self._key(waiting.prefill_s, waiting.due_at)
                tenant.line.sort(key=_sort_key)
        self._promotions = [
            (waiting.level_since + settings.promote_after_s, waiting.number, waiting)
            for waiting in self._waiting.values()
            if waiting.is_rising
        ]
        heapq.heapify(self._promotions)

    def add(
        self, request: RoutableRequest, uncached_tokens: int, prefill_s: float, explanation: Explanation, *, now: float
    ) -> Waiting:
        self._number += 1
        number, level, first = self._number, request.priority, self._first_class()
        waiting = Waiting(request, now, uncached_tokens, prefill_s, explanation, number, level, now)
        waiting.due_at = self._due_at(request, now)
        waiting.key = self._key(prefill_s, waiting.due_at)
        self._waiting[request.request] = waiting
        self._count(waiting, 1)
        self._enter(waiting)
        heapq.heappush(self._deadlines, (request.deadline, number, waiting))
        if request.slo_ttft_s is not None:
            heapq.heappush(self._hopes, (waiting.due_at - prefill_s, number, waiting))
        if level < first:  # those that were first are so no longer
            for other in self._waiting.values():
                self._plan_promotion(other)
        else:
            self._plan_promotion(waiting)
        return waiting

    def remove(self, waiting: Waiting) -> None:
        """Withdrawn or expired: its tenant has not been served."""
        del self._waiting[waiting.request.request]
        self._count(waiting, -1)
        self._leave(waiting)
        if len(self._deadlines) > 2 * len(self._waiting) + 64:
            self._tidy()

    def serve(self, waiting: Waiting) -> None:
        """Bound: its tenant pays for it, and rounds go on as far as that needs."""
        level = self._levels[waiting.level]
        tenant = level.tenants[waiting.request.tenant]
        level.round += self._rounds(level, tenant, waiting.uncached_tokens)
        tenant.spent += waiting.uncached_tokens
        self.remove(waiting)

    def update(self, waiting: Waiting, uncached_tokens: int, prefill_s: float) -> None:
        """What is cached has changed, and with it the request's place."""
        self._count(waiting, -1)
        if prefill_s != waiting.prefill_s:
            self._place_anew(waiting, prefill_s, waiting.due_at)
        waiting.uncached_tokens = uncached_tokens
        self._count(waiting, 1)

    def _place_anew(self, waiting: Waiting, prefill_s: float, due_at: float) -> None:
        tenant = self._levels[waiting.level].tenants[waiting.request.tenant]
        del tenant.line[_place(tenant.line, waiting)]
        waiting.prefill_s, waiting.due_at = prefill_s, due_at
        waiting.key = self._key(prefill_s, due_at)
        insort(tenant.line, waiting, key=_sort_key)

    def expired(self, now: float) -> list[Waiting]:
        """Requests whose deadline has passed; they are still in the queue."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            waiting = heapq.heappop(self._deadlines)[2]
            if self._waiting.get(waiting.request.request) is waiting:
                late.append(waiting)
        return late

    def promote(self, now: float) -> None:
        """Move those that have waited long enough one class up."""
        while self._promotions and self._promotions[0][0] <= now:
            instant, _, waiting = heapq.heappop(self._promotions)
            if self._waiting.get(waiting.request.request) is not waiting:
                continue
            waiting.is_rising = False
            if waiting.level > self._first_class():
                self._leave(waiting)
                waiting.level -= 1
                waiting.level_since = instant
                self._enter(waiting)
                self._plan_promotion(waiting)

    def let_go(self, now: float) -> None:
        """Move those that can no longer be in time behind those that can."""
        while self._hopes and self._hopes[0][0] <= now:
            waiting = heapq.heappop(self._hopes)[2]
            if self._waiting.get(waiting.request.request) is not waiting:
                continue
            latest = waiting.due_at - waiting.prefill_s
            if latest > now:  # more of its prompt is cached than when it came
                heapq.heappush(self._hopes, (latest, waiting.number, waiting))
            else:
                self.make_way(waiting)

    def make_way(self, waiting: Waiting) -> None:
        """It can no longer be in time, or only at their cost: move it behind those that can, once."""
        if not waiting.is_late:
            self._count(waiting, -1)
            waiting.is_late = True
            self._place_anew(waiting, waiting.prefill_s, waiting.due_at + self._settings.late_s)

    def _count(self, waiting: Waiting, times: int) -> None:
        """times: 1 where it comes to be one of those that hope, -1 where it no longer is; others are not counted."""
        if waiting.request.slo_ttft_s is not None and not waiting.is_late:
            self._num_hopeful += times
            self._hopeful_tokens += times * waiting.uncached_tokens
            self._hopeful_s = self._hopeful_s + times * waiting.prefill_s if self._num_hopeful else 0.0

    def _plan_promotion(self, waiting: Waiting) -> None:
        if not waiting.is_rising and waiting.level > self._first_class():
            waiting.is_rising = True
            instant = waiting.level_since + self._settings.promote_after_s
            heapq.heappush(self._promotions, (instant, waiting.number, waiting))

    def _first_class(self) -> int:
        """Class 0, or the first one in which anybody waits."""
        return min(0, *self._levels) if self._levels else 0

    def _due_at(self, request: RoutableRequest, now: float) -> float:
        """Of a request that comes now, while it can be in time."""
        return now + (self._settings.promote_after_s if request.slo_ttft_s is None else request.slo_ttft_s)

    def _key(self, prefill_s: float, due_at: float) -> float:
        return prefill_s + self._settings.aging * due_at

    def wakeup(self) -> float:
        """The next deadline or promotion; infinity if there is none."""
        ends = [heap[0][0] for heap in (self._deadlines, self._promotions) if heap]
        return min(ends, default=math.inf)

    # --- order ---------------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[Waiting]:
        """All requests in order of service. The queue must not change during the walk."""
        for number in sorted(self._levels):
            level = self._levels[number]
            if len(level.tenants) == 1:
                yield from next(iter(level.tenants.values())).line
            else:
                lines = [self._due(level, tenant) for tenant in level.tenants.values()]
                for _, _, _, waiting in heapq.merge(*lines):
                    yield waiting

    def _due(self, level: _Level, tenant: _Tenant) -> Iterator[tuple[int, float, int, Waiting]]:
        """A tenant's requests with the round in which each is due, counted from now."""
        tokens = 0
        for waiting in tenant.line:
            tokens += waiting.uncached_tokens
            yield self._rounds(level, tenant, tokens), waiting.key, waiting.number, waiting

    def _rounds(self, level: _Level, tenant: _Tenant, tokens: int) -> int:
        """Further rounds until a tenant can pay `tokens`."""
        quantum = self._settings.quantum_tokens
        saved = (level.round - tenant.joined) * quantum - tenant.spent
        if saved > _MAX_SAVED_ROUNDS * quantum:
            tenant.spent += saved - _MAX_SAVED_ROUNDS * quantum
            saved = _MAX_SAVED_ROUNDS * quantum
        return max(0, -(-(tokens - saved) // quantum))

    def _enter(self, waiting: Waiting) -> None:
        level = self._levels.setdefault(waiting.level, _Level())
        tenant = level.tenants.get(waiting.request.tenant)
        if tenant is None:
            tenant = level.tenants[waiting.request.tenant] = _Tenant(level.round)
        insort(tenant.line, waiting, key=_sort_key)

    def _leave(self, waiting: Waiting) -> None:
        level = self._levels[waiting.level]
        tenant = level.tenants[waiting.request.tenant]
        del tenant.line[_place(tenant.line, waiting)]
        if not tenant.line:  # as deficit round robin has it: who has nothing to send saves nothing
            del level.tenants[waiting.request.tenant]
            if not level.tenants:
                del self._levels[waiting.level]

    def _tidy(self) -> None:
        """Drop what the heaps still keep of requests that left: they stay in proportion to the queue."""
        for heap in (self._deadlines, self._promotions, self._hopes):
            heap[:] = [entry for entry in heap if self._waiting.get(entry[2].request.request) is entry[2]]
            heapq.heapify(heap)

    # --- answers about itself ------------------------------------------------------------------------------------

    def hopeful(self) -> Hopeful:
        num = self._num_hopeful
        return Hopeful(num, self._hopeful_tokens / num, self._hopeful_s / num) if num else NOBODY_HOPES

    def all(self) -> Iterator[Waiting]:
        """Everybody, oldest first."""
        return iter(self._waiting.values())

    def work_before_s(self, request: RoutableRequest, prefill_s: float, now: float) -> float:
        """Predicted prefill seconds of all that would be served before a request of so many, were it to come now.

        Tenants' rounds are left out.
        """
        level, key = request.priority, self._key(prefill_s, self._due_at(request, now))
        before = (
            waiting.prefill_s
            for waiting in self._waiting.values()
            if waiting.request.model == request.model
            and (waiting.level < level or (waiting.level == level and waiting.key <= key))
        )
        return sum(before, start=0.0)

    def depths(self) -> dict[int, int]:
        """Requests per class, as promoted."""
        return {
            number: sum(len(tenant.line) for tenant in level.tenants.values()) for number, level in self._levels.items()
        }


def _sort_key(waiting: Waiting) -> tuple[float, int]:
    return waiting.key, waiting.number


def _place(line: list[Waiting], waiting: Waiting) -> int:
    return bisect_left(line, _sort_key(waiting), key=_sort_key)
