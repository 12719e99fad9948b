"""Late binding: which of the waiting requests to ask the policy about, so that thousands may wait at little cost.

Asking about every waiting request whenever something changes would cost queue x workers. Instead each request that was
held keeps what every worker bid for it: its predicted cost there without the worker's queue, the step that it would
join, and what those who wait lose by it, all of which change. A dispatch walks the queue in order of service. Each
request takes the worker that is cheapest by its bid and by these as they are now, where the work of those before it
counts as queue already (list scheduling). If that worker has room the policy is asked, and decides anew with fresh
numbers; if not, the request's work lies before those that follow. The walk ends when no worker has room left, or after
`_MAX_WALK` requests. Where an engine computes the shortest prompt first, one shorter than all that are bound there
needs no room.

So a hot worker's line grows, for those at its end, until an idle worker is cheaper for them. Bids go stale by at most
`_STALE_S` or the time until the request comes into reach of the walk; they only choose whom to ask.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from planes.wire.messages import WorkerId
from router.decision import Decision
from router.fleet import Fleet
from router.queue import Bids, Queue, Waiting
from router.request import Candidate, RoutableRequest
from router.worker import Worker

_MAX_WALK = 256
_MAX_ASKED_WORKERS = 256  # a walk asks about as many requests as give this many workers to weigh, and about 4
_MAX_REFRESHED = 4
_MAX_BLOCKED = 64
_WIDE = 16  # from so many workers on, an array is quicker than a loop
_STALE_S = 0.5
_SPARED_S = 0.05  # those who are held for streams are asked about no more often than that, a walk's number at a time
_SHARES_S = 0.01  # shares are found out no more often than that …
_MOST_SHARED = 64  # … from so many of those who wait
_NO_PRICES = np.zeros(0)
_POLL_S = 0.5
"""With requests waiting, dispatch runs at least this often: utilisation decays, and reports may have stopped."""


class LateBinding:
    """Chooses whom to ask about. Keeps nothing that it could not find out again by asking."""

    def __init__(self, fleet: Fleet, queue: Queue) -> None:
        self.fleet = fleet
        self.queue = queue
        self.version = 0
        """Of the rows that bids name; another one makes them void."""
        self.names: list[WorkerId] = []
        self.rows: dict[WorkerId, int] = {}
        self.shortest_first: list[tuple[int, Worker]] = []
        self.shares: dict[WorkerId, float] = {}
        """Of those who wait, the share that each worker will compute, as far as anybody knows."""
        self._shared_at = -math.inf
        self.room_changes = 0
        self.round = 0
        """A walk that had to stop goes on in the next one: in a round nobody is asked about twice who lacks room."""
        self.spared_at = -math.inf
        """When those who are held for streams were last asked about."""
        self.max_backlog_s = math.inf
        """More prompt work than this, and a worker has no room for more: as the policy last said."""
        self.wakeup = math.inf
        """When to walk again though nothing else happened."""
        self._fleet_version = -1

    def forget(self) -> None:
        """The policy changed: ask about everybody anew."""
        self.version += 1
        self.max_backlog_s = math.inf

    def share_out(self, in_reach: Sequence[Waiting], backlogs_s: Sequence[float], now: float) -> None:
        """Find out who will compute what waits: some of it goes to workers one by one, each to where it costs least
        with the lines that have grown there and what the line loses by it.

        Lines that get some of it are of one length where all may go anywhere, however much lay there before: then a
        place in one is worth as much as in another, and so a line counts whole, as that many requests as it is long.
        A price makes as many go elsewhere as it overstates, and those are the next price: halfway it is right.

        backlogs_s: per worker, what lies there already.
        """
        if now < self._shared_at + _SHARES_S:
            return
        some = in_reach[:: -(-len(in_reach) // _MOST_SHARED)]
        known = [waiting.bids for waiting in some if waiting.bids is not None and waiting.bids.version == self.version]
        if not known:
            return
        self._shared_at = now
        lines_s, prices = list(backlogs_s), self.prices()
        arrays = (np.array(lines_s), np.array(prices)) if known[0].arrays is not None else None
        each, counts, works_s = len(self.queue) / len(known), [0] * len(lines_s), [0.0] * len(lines_s)
        for bids in known:
            if arrays is not None and bids.arrays is not None:
                rows, own_s, work_s = bids.arrays
                place = int((own_s + arrays[0][rows] + arrays[1][rows] * work_s).argmin())
                arrays[0][bids.rows[place]] += each * bids.work_s[place]
            else:
                costs = [
                    own_s + lines_s[row] + prices[row] * work_s
                    for row, own_s, work_s in zip(bids.rows, bids.own_s, bids.work_s, strict=True)
                ]
                place = costs.index(min(costs))
                lines_s[bids.rows[place]] += each * bids.work_s[place]
            counts[bids.rows[place]] += 1
            works_s[bids.rows[place]] += bids.work_s[place]
        if arrays is not None:
            lines_s = arrays[0].tolist()
        in_line = [
            line_s * count / work_s if work_s else 0.0
            for line_s, count, work_s in zip(lines_s, counts, works_s, strict=True)
        ]
        total = sum(in_line)
        for name, number in zip(self.names, in_line, strict=True):
            share = number / total if total else 0.0
            self.shares[name] = (self.shares.get(name, share) + share) / 2

    def prices(self) -> list[float]:
        """What a second of prompt work at each worker costs those who wait, in seconds."""
        return [len(self.queue) * self.shares.get(name, 0.0) for name in self.names]

    def room_changed(self) -> None:
        """A worker reported, or a request ended: those that lacked room to decode may try again."""
        self.room_changes += 1

    def walk(self, now: float) -> "Walk":
        """One walk over the queue. Bind, hold or refuse each of its requests before taking the next."""
        if self._fleet_version != self.fleet.version:
            self._fleet_version = self.fleet.version
            self.version += 1
            self.names = list(self.fleet.workers)
            self.shares, self._shared_at = {}, -math.inf
            self.rows = {name: row for row, name in enumerate(self.names)}
            workers = enumerate(self.fleet.workers.values())
            self.shortest_first = [(row, worker) for row, worker in workers if worker.facts.is_shortest_first]
        return Walk(self, now)

    def shortest(self, request: RoutableRequest) -> tuple[int, float]:
        """Uncached tokens and prefill seconds of a request where most of it is cached."""
        tokens, seconds = request.prompt_tokens, math.inf
        for name, depth in self.fleet.cached_blocks(request).items():
            worker = self.fleet.workers.get(name)
            if worker is None or name in request.excluded:
                continue
            size = worker.facts.block_size
            if request.block_size in (0, size):
                uncached = request.prompt_tokens - min(depth, (request.prompt_tokens - 1) // size) * size
                if uncached < tokens:
                    tokens, seconds = uncached, worker.latency.prefill_s(uncached, request.prompt_tokens)
        if seconds == math.inf:
            worker = next(iter(self.fleet.eligible(request)), None)
            seconds = worker.latency.prefill_s(tokens, tokens) if worker is not None else 0.0
        return tokens, seconds

    def wait_s(self, request: RoutableRequest, now: float) -> float:
        """Predicted wait in the gateway's queue of a request that came now."""
        if not len(self.queue):
            return 0.0
        _, seconds = self.shortest(request)
        workers = self.fleet.eligible(request)
        computing = sum(worker.role.can_prefill for worker in workers) or len(workers) or 1
        return self.queue.work_before_s(request, seconds, now) / computing


class Walk:
    """One walk: what it has passed lies before what follows, in `ahead` seconds of prompt work per worker."""

    def __init__(self, binding: LateBinding, now: float) -> None:
        self.ahead: dict[WorkerId, float] = {}
        self.without_room: Counter[WorkerId] = Counter()
        """Requests that it has passed because they wait for room to decode there."""
        self._binding = binding
        self._now = now
        self._is_set_up = False
        self._num_refreshed = self._num_blocked = 0
        self._prices: list[float] = []
        self._price_array = _NO_PRICES
        """The same of many workers."""
        self._may_spare = now >= binding.spared_at + _SPARED_S

    def _set_up(self) -> None:
        """Look at the workers: a walk past a single new request has no need of it."""
        self._is_set_up = True
        binding, now = self._binding, self._now
        queue_s = [worker.backlog_s(now) for worker in binding.fleet.workers.values()]
        self._room = {row for row, backlog_s in enumerate(queue_s) if backlog_s <= binding.max_backlog_s}
        """Rows of workers that may take another request."""
        self._queue_s = queue_s
        """Per row, work of requests that this walk has passed included."""
        self._passed_tokens, self._starts_in_s = [0] * len(queue_s), queue_s.copy()
        """Per row: prompts shorter than the first need no room and begin after the second."""
        self._shared = [worker.shared() for worker in binding.fleet.workers.values()]
        """Per row: work and prompts in the step that all others join."""
        for row, worker in binding.shortest_first:
            self._passed_tokens[row], self._starts_in_s[row] = worker.passing(queue_s[row])
        self._most_passed = max(self._passed_tokens, default=0)
        self._arrays = None
        """All of these once more, of many workers."""
        if len(queue_s) >= _WIDE:
            self._arrays = np.array((queue_s, self._passed_tokens, self._starts_in_s, *zip(*self._shared, strict=True)))

    def __iter__(self) -> Iterator[Waiting]:
        """The requests to ask the policy about, in order of service."""
        binding, now = self._binding, self._now
        binding.wakeup = now + _POLL_S
        if (only := binding.queue.only()) is not None and only.bids is None:
            yield only
            binding.round += 1
            if self._is_set_up:
                binding.wakeup = min(binding.wakeup, self._next_room())
            return
        self._set_up()
        max_asked, num_asked = max(4, _MAX_ASKED_WORKERS // max(1, len(binding.names))), 0
        in_reach = list(islice(binding.queue.walk(), _MAX_WALK)) if self._room or self._most_passed else []
        if in_reach:
            lines_s = [queue_s + shared_s for queue_s, (shared_s, _) in zip(self._queue_s, self._shared, strict=True)]
            binding.share_out(in_reach, lines_s, now)
            self._prices = binding.prices()
            if self._arrays is not None:
                self._price_array = np.array(self._prices)
        for waiting in in_reach:
            if self._num_blocked >= _MAX_BLOCKED or not (self._room or self._most_passed):
                break
            if not self._room and waiting.request.prompt_tokens >= self._most_passed:
                continue
            if num_asked >= max_asked:
                binding.wakeup = now
                return
            if self._is_to_ask(waiting):
                num_asked += 1
                yield waiting
        binding.round += 1
        binding.wakeup = min(binding.wakeup, self._next_room())

    def bound(self, chosen: Candidate) -> None:
        """A request was bound: its worker has more to do."""
        if not self._is_set_up:
            return
        binding, name = self._binding, chosen.prefill or chosen.decode
        row, worker = binding.rows[name], binding.fleet.workers[name]
        backlog_s = worker.backlog_s(self._now)
        self._queue_s[row] = backlog_s + self.ahead.get(name, 0.0)
        if worker.facts.is_shortest_first:
            self._passed_tokens[row], self._starts_in_s[row] = worker.passing(backlog_s)
            self._most_passed = max(self._passed_tokens)
        self._shared[row] = worker.shared()
        if self._arrays is not None:
            passed_tokens, starts_in_s = self._passed_tokens[row], self._starts_in_s[row]
            self._arrays[:, row] = self._queue_s[row], passed_tokens, starts_in_s, *self._shared[row]
        if self._queue_s[row] > binding.max_backlog_s:
            self._room.discard(row)

    def held(self, waiting: Waiting, decision: Decision) -> None:
        """A request is held back: it bids for the workers from now on, and those after it come after its work."""
        if not self._is_set_up:
            self._set_up()
        binding, chosen, limit_s = self._binding, decision.chosen, decision.max_backlog_s
        known_s = 0.0 if binding.max_backlog_s == math.inf else 0.99 * binding.max_backlog_s
        binding.max_backlog_s = max(limit_s, known_s)
        waiting.bids = self._bids(decision)
        best = min(decision.candidates, key=_work_s)
        uncached_tokens = max(0, waiting.request.prompt_tokens - best.cached_tokens)
        binding.queue.update(waiting, uncached_tokens, _work_s(best))
        row = binding.rows[chosen.prefill or chosen.decode]
        waiting.spares_streams = decision.spares_streams
        if decision.spares_streams:
            waiting.round = binding.round
            binding.wakeup = min(binding.wakeup, self._now + _SPARED_S)
        elif decision.lacks_room or chosen.num_passed:
            waiting.round = binding.round
            waiting.blocked, waiting.blocked_by = binding.room_changes, chosen.waits_for_room
            self._blocked(waiting)
        else:
            self._pass(row, _work_s(chosen), limit_s)
            self._room.discard(row)

    def _is_to_ask(self, waiting: Waiting) -> bool:
        bids = waiting.bids
        if bids is None or bids.version != self._binding.version:
            return True
        if waiting.spares_streams:
            return self._is_to_spare(waiting)
        if self._room and bids.made_at < self._now - _STALE_S and self._num_refreshed < _MAX_REFRESHED:
            self._num_refreshed += 1
            return True
        tokens = waiting.request.prompt_tokens
        cheapest, queue_s = self._cheapest(bids, tokens)
        row = bids.rows[cheapest]
        if queue_s > bids.max_backlog_s and tokens >= self._passed_tokens[row]:
            self._pass(row, bids.work_s[cheapest], bids.max_backlog_s)
            return False
        if waiting.blocked == self._binding.room_changes or waiting.round == self._binding.round:
            self._blocked(waiting)
            return False
        return True

    def _is_to_spare(self, waiting: Waiting) -> bool:
        """Streams end at any time; asking about all that wait for that at each report would cost more than it gives."""
        binding = self._binding
        if not self._may_spare:
            binding.wakeup = min(binding.wakeup, binding.spared_at + _SPARED_S)
            return False
        if waiting.round == binding.round:
            return False
        binding.spared_at = self._now
        return True

    def _blocked(self, waiting: Waiting) -> None:
        self._num_blocked += 1
        if waiting.blocked_by is not None:
            self.without_room[waiting.blocked_by] += 1

    def _cheapest(self, bids: Bids, tokens: int) -> tuple[int, float]:
        """Which bid is least with its worker's queue, and that queue. Runs for each request of each walk."""
        if self._arrays is not None and bids.arrays is not None:
            rows, own_s, work_s = bids.arrays
            waits, passed_tokens, starts_in_s, shared_s, num_sharing = self._arrays[:, rows]
            costs = own_s + waits + shared_s + (num_sharing + self._price_array[rows]) * work_s
            if tokens < self._most_passed:
                passes = tokens < passed_tokens
                waits = np.where(passes, starts_in_s, waits)
                costs = np.where(passes, own_s + starts_in_s + self._price_array[rows] * work_s, costs)
            place = int(costs.argmin())
            return place, float(waits[place])
        best, best_wait_s, least_s = 0, 0.0, math.inf
        for place, row in enumerate(bids.rows):
            wait_s, shared_s, num_sharing = self._queue_s[row], *self._shared[row]
            if tokens < self._passed_tokens[row]:
                wait_s, shared_s, num_sharing = self._starts_in_s[row], 0.0, 0
            cost_s = bids.own_s[place] + wait_s + shared_s + (num_sharing + self._prices[row]) * bids.work_s[place]
            if cost_s < least_s:
                best, best_wait_s, least_s = place, wait_s, cost_s
        return best, best_wait_s

    def _pass(self, row: int, work_s: float, max_backlog_s: float) -> None:
        """A request waits for this worker: those after it come after its work."""
        self._queue_s[row] += work_s
        if self._arrays is not None:
            self._arrays[0, row] = self._queue_s[row]
        name = self._binding.names[row]
        self.ahead[name] = self.ahead.get(name, 0.0) + work_s
        if self._queue_s[row] > max_backlog_s:
            self._room.discard(row)

    def _bids(self, decision: Decision) -> Bids:
        cheapest: dict[int, tuple[float, float, float]] = {}
        for option in decision.candidates:
            row = self._binding.rows[option.prefill or option.decode]
            cost_s = option.order_s - option.queue_s
            bid = cost_s, cost_s - option.congestion_s - option.shared_s, _work_s(option)
            if row not in cheapest or bid < cheapest[row]:
                cheapest[row] = bid
        _, own_s, work_s = zip(*cheapest.values(), strict=True)
        rows = list(cheapest)
        arrays = (np.array(rows), np.array(own_s), np.array(work_s)) if self._arrays is not None else None
        return Bids(self._binding.version, self._now, rows, own_s, work_s, decision.max_backlog_s, arrays)

    def _next_room(self) -> float:
        """When the first busy worker will have room, by prediction."""
        limit_s, rows = self._binding.max_backlog_s, self._binding.rows
        waits = [(name, self._queue_s[row]) for name, row in rows.items() if self._queue_s[row] > limit_s]
        rooms = [self._now + queue_s - self.ahead.get(name, 0.0) - limit_s for name, queue_s in waits]
        return min((instant for instant in rooms if instant > self._now), default=math.inf)


def _work_s(option: Candidate) -> float:
    """A policy of somebody's own may know of prefills only."""
    return option.work_s or option.prefill_s
