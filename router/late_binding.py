"""Late binding: which of the waiting requests to ask the policy about, so that thousands may wait at little cost.

Asking about every waiting request whenever something changes would cost queue x workers. Instead each request that was
held keeps what every worker bid for it: its predicted cost there without the worker's queue. A dispatch walks the queue
in order of service. Each request takes the worker that is cheapest by its bid plus that worker's queue, where the work
of those before it counts as queue already (list scheduling). If that worker has room the policy is asked, and decides
anew with fresh numbers; if not, the request's work lies before those that follow. The walk ends when no worker has room
left, or after `_MAX_WALK` requests. Where an engine computes the shortest prompt first, one shorter than all that are
bound there needs no room.

So a hot worker's line grows, for those at its end, until an idle worker is cheaper for them. Bids go stale by at most
`_STALE_S` or the time until the request comes into reach of the walk; they only choose whom to ask.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from planes.wire.messages import WorkerId
from router.fleet import Fleet
from router.policy import Choice
from router.queue import Bids, Queue, Waiting
from router.request import Candidate, RoutableRequest
from router.worker import Worker

_MAX_WALK = 256
_MAX_ASKED_WORKERS = 256  # a walk asks about as many requests as give this many workers to weigh, and about 4
_MAX_REFRESHED = 4
_MAX_BLOCKED = 16
_STALE_S = 0.5
_POLL_S = 0.5
"""With requests waiting, dispatch runs at least this often: utilisation decays, and reports may have stopped."""

Decide = Callable[[Waiting, dict[WorkerId, float]], Choice | None]
"""Asks the policy about one request, given the seconds of work queued before it per worker, and binds it unless the
answer is to hold it. None: the request was refused instead."""


@dataclass(slots=True)
class _Walk:
    """State of one walk. queue_s: per worker, work of requests that this walk has passed included; `ahead` that alone.

    room: rows of workers that may take another request.  passed_tokens: shorter prompts need no room there and begin
    after `starts_in_s`; most_passed is the largest.
    """

    now: float
    queue_s: npt.NDArray[np.float64]
    room: set[int]
    passed_tokens: npt.NDArray[np.int64]
    starts_in_s: npt.NDArray[np.float64]
    most_passed: int = 0
    ahead: dict[WorkerId, float] = field(default_factory=dict)
    num_asked: int = 0
    num_refreshed: int = 0
    num_blocked: int = 0


class Dispatch:
    """Walks the queue. Keeps nothing that it could not find out again by asking."""

    def __init__(self, fleet: Fleet, queue: Queue) -> None:
        self._fleet = fleet
        self._queue = queue
        self._version = 0
        self._fleet_version = -1
        self._names: list[WorkerId] = []
        self._rows: dict[WorkerId, int] = {}
        self._shortest_first: list[tuple[int, Worker]] = []
        self._room_changes = 0
        self._max_backlog_s = math.inf
        self._wakeup = math.inf

    def forget(self) -> None:
        """The policy changed: ask about everybody anew."""
        self._version += 1
        self._max_backlog_s = math.inf

    def room_changed(self) -> None:
        """A worker reported, or a request ended: those that lacked room to decode may try again."""
        self._room_changes += 1

    def wakeup(self) -> float:
        """When to run again though nothing else happened."""
        return self._wakeup

    def run(self, decide: Decide, now: float) -> None:
        """Bind whoever can be bound now."""
        if self._fleet_version != self._fleet.version:
            self._fleet_version = self._fleet.version
            self._version += 1
            self._names = list(self._fleet.workers)
            self._rows = {name: row for row, name in enumerate(self._names)}
            workers = enumerate(self._fleet.workers.values())
            self._shortest_first = [(row, worker) for row, worker in workers if worker.facts.is_shortest_first]
        queue_s = np.array([worker.backlog_s(now) for worker in self._fleet.workers.values()])
        room = set(np.flatnonzero(queue_s <= self._max_backlog_s).tolist())
        walk = _Walk(now, queue_s, room, np.zeros(len(queue_s), dtype=np.int64), np.zeros(len(queue_s)))
        for row, worker in self._shortest_first:
            walk.passed_tokens[row], walk.starts_in_s[row] = worker.passing(float(queue_s[row]))
        if self._shortest_first:
            walk.most_passed = int(walk.passed_tokens.max())
        self._wakeup = now + _POLL_S
        max_asked = max(4, _MAX_ASKED_WORKERS // max(1, len(self._names)))
        for waiting in list(islice(self._queue.walk(), _MAX_WALK)):
            if walk.num_blocked >= _MAX_BLOCKED or not (walk.room or walk.most_passed):
                break
            if not walk.room and waiting.request.prompt_tokens >= walk.most_passed:
                continue
            if walk.num_asked >= max_asked:
                self._wakeup = now
                return
            if self._is_to_ask(waiting, walk):
                walk.num_asked += 1
                self._ask(waiting, decide, walk)
        self._wakeup = min(self._wakeup, self._next_room(now))

    def _is_to_ask(self, waiting: Waiting, walk: _Walk) -> bool:
        bids = waiting.bids
        if bids is None or bids.version != self._version:
            return True
        if walk.room and bids.made_at < walk.now - _STALE_S and walk.num_refreshed < _MAX_REFRESHED:
            walk.num_refreshed += 1
            return True
        rows, tokens = bids.rows, waiting.request.prompt_tokens
        queue_s = walk.queue_s[rows]
        if tokens < walk.most_passed:
            queue_s = np.where(tokens < walk.passed_tokens[rows], walk.starts_in_s[rows], queue_s)
        cheapest = int((bids.cost_s + queue_s).argmin())
        row = int(rows[cheapest])
        if queue_s[cheapest] > bids.max_backlog_s and tokens >= walk.passed_tokens[row]:
            self._pass(row, float(bids.work_s[cheapest]), bids.max_backlog_s, walk)
            return False
        if waiting.blocked == self._room_changes:
            walk.num_blocked += 1
            return False
        return True

    def _ask(self, waiting: Waiting, decide: Decide, walk: _Walk) -> None:
        choice = decide(waiting, walk.ahead)
        if choice is None:
            return
        chosen = choice.chosen
        name = chosen.prefill or chosen.decode
        row = self._rows[name]
        if not choice.is_held:
            worker = self._fleet.workers[name]
            backlog_s = worker.backlog_s(walk.now)
            walk.queue_s[row] = backlog_s + walk.ahead.get(name, 0.0)
            walk.passed_tokens[row], walk.starts_in_s[row] = worker.passing(backlog_s)
            walk.most_passed = int(walk.passed_tokens.max())
            if walk.queue_s[row] > self._max_backlog_s:
                walk.room.discard(row)
            return
        known_s = 0.0 if self._max_backlog_s == math.inf else 0.99 * self._max_backlog_s
        self._max_backlog_s = max(choice.max_backlog_s, known_s)
        waiting.bids = self._bids(choice, walk.now)
        best = min(choice.candidates, key=_prefill_s)
        self._queue.update(waiting, max(0, waiting.request.prompt_tokens - best.cached_tokens), best.prefill_s)
        if walk.queue_s[row] > choice.max_backlog_s and not chosen.num_passed:
            self._pass(row, chosen.prefill_s, choice.max_backlog_s, walk)
        else:
            waiting.blocked = self._room_changes
            walk.num_blocked += 1

    def _pass(self, row: int, work_s: float, max_backlog_s: float, walk: _Walk) -> None:
        """A request waits for this worker: those after it come after its work."""
        walk.queue_s[row] += work_s
        name = self._names[row]
        walk.ahead[name] = walk.ahead.get(name, 0.0) + work_s
        if walk.queue_s[row] > max_backlog_s:
            walk.room.discard(row)

    def _bids(self, choice: Choice, now: float) -> Bids:
        cheapest: dict[int, tuple[float, float]] = {}
        for option in choice.candidates:
            row = self._rows[option.prefill or option.decode]
            bid = option.total_s - option.queue_s, option.prefill_s
            if row not in cheapest or bid < cheapest[row]:
                cheapest[row] = bid
        costs, works = zip(*cheapest.values(), strict=True)
        rows = np.fromiter(cheapest, dtype=np.intp, count=len(cheapest))
        return Bids(self._version, now, rows, np.array(costs), np.array(works), choice.max_backlog_s)

    def _next_room(self, now: float) -> float:
        """When the first busy worker will have room, by prediction."""
        waits = [worker.busy_until - self._max_backlog_s for worker in self._fleet.workers.values()]
        return min((instant for instant in waits if instant > now), default=math.inf)

    # --- predictions for requests that are not asked about ---------------------------------------------------------

    def shortest(self, request: RoutableRequest) -> tuple[int, float]:
        """Uncached tokens and prefill seconds of a request where most of it is cached."""
        tokens, seconds = request.prompt_tokens, math.inf
        for name, depth in self._fleet.cached_blocks(request).items():
            worker = self._fleet.workers.get(name)
            if worker is not None and name not in request.excluded:
                size = worker.facts.block_size
                uncached = request.prompt_tokens - min(depth, (request.prompt_tokens - 1) // size) * size
                if uncached < tokens:
                    tokens, seconds = uncached, worker.latency.prefill_s(uncached, request.prompt_tokens)
        if seconds == math.inf:
            worker = next(iter(self._fleet.eligible(request)), None)
            seconds = worker.latency.prefill_s(tokens, tokens) if worker is not None else 0.0
        return tokens, seconds

    def wait_s(self, request: RoutableRequest, now: float, *, aging: float) -> float:
        """Predicted wait in the gateway's queue of a request that came now."""
        if not len(self._queue):
            return 0.0
        _, seconds = self.shortest(request)
        workers = self._fleet.eligible(request)
        computing = sum(worker.registration.role.can_prefill for worker in workers) or len(workers) or 1
        return self._queue.work_before_s(request, seconds + aging * now) / computing


def _prefill_s(option: Candidate) -> float:
    return option.prefill_s
