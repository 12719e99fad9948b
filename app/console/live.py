"""The fleet's state for those that look at it: once whole, then what has changed, about once a second.

    watched ──► whole ──► (tick) delta ──► (tick) delta …          missed a tick: whole again
                                        … stop, or the watcher goes

Nobody looks: nothing is collected, counted or kept. Somebody does: load reports and ended requests are added up as they
come, and the first watcher that a tick wakes makes its delta for all. There is no queue to fill up: a watcher that is
slow misses ticks.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final, TypeVar

import msgspec

from app.console.rows import WorkerRow, changed, handover_rows, request_row, total_hits, worker_row
from app.fleet.connections import WorkerConnections
from app.fleet.routing_config import RoutingConfigFollower
from app.serving.binding import Clock, Dispatcher
from planes.wire.errors import Rejected
from planes.wire.messages import LoadReport, WorkerId
from router.router import Router
from router.timeline import Timeline

T = TypeVar("T")

PERIOD_S: Final = 1.0
MOST_WATCHERS: Final = 32
_MOST_REQUESTS: Final = 60
"""Told per tick. Of more a sample, evenly drawn: percentiles stay true."""
_MOST_KEPT: Final = 4096
"""Ended requests that may wait for the next tick; only their number is told of more."""
_FIRST_REQUESTS: Final = 200
"""With which a page begins."""
_MOST_PAIRS: Final = 256
_HIT_WINDOW: Final = 2000
"""Requests that hit rates are of."""
_LATE_S: Final = 0.005
"""After a tick, so that timers which come early find it over."""


class TooManyWatchers(Rejected):
    """So many pages are open that there is no stream for another one."""

    code = "too_many_watchers"

    def __init__(self) -> None:
        super().__init__(
            f"{MOST_WATCHERS} consoles watch this gateway and the limit is {MOST_WATCHERS}; close one of them.",
            retry_after_s=5.0,
        )


class Live:
    """What one gateway tells its watchers."""

    def __init__(
        self,
        fleet: WorkerConnections,
        router: Router,
        dispatcher: Dispatcher,
        routing: RoutingConfigFollower,
        *,
        clock: Clock,
        wall_clock: Clock,
        about: Mapping[str, Any],
    ) -> None:
        """about: what the page says of this gateway."""
        self._fleet, self._router, self._dispatcher, self._routing = fleet, router, dispatcher, routing
        self._clock, self._wall_clock = clock, wall_clock
        self._about = about
        self._num_watchers = 0
        self._stopped = asyncio.Event()
        self._forget()

    @property
    def num_watchers(self) -> int:
        return self._num_watchers

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count one more watcher.  Raises:  TooManyWatchers."""
        if self._num_watchers >= MOST_WATCHERS:
            raise TooManyWatchers
        if not self._num_watchers:
            self._begin()
        self._num_watchers += 1
        try:
            yield
        finally:
            self._num_watchers -= 1
            if not self._num_watchers:
                self._end()

    async def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events for one watcher, until the gateway stops. Use it within `watched`."""
        seen = self._number
        yield self._whole()
        while await self._until_tick():
            self._advance()
            before, seen = seen, self._number
            if seen != before:
                yield self._delta if seen == before + 1 else self._whole()

    def stop(self) -> None:
        """End all streams."""
        self._stopped.set()

    # --- collecting ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._unwatch: list[Callable[[], None]] = []
        self._number, self._slot, self._since = 0, 0, 0.0
        self._delta = b""
        self._workers: dict[WorkerId, WorkerRow] = {}
        self._computed: dict[WorkerId, tuple[int, int]] = {}
        self._ended: list[Timeline] = []
        self._num_ended = self._num_failed = 0
        self._window: deque[tuple[WorkerId, int, int]] = deque()
        self._hits: defaultdict[WorkerId, tuple[int, int]] = defaultdict(lambda: (0, 0))

    def _begin(self) -> None:
        self._unwatch.append(self._fleet.reports.watch(self._reported))
        self._unwatch.append(self._dispatcher.endings.watch(self._on_ended))
        self._since = self._clock()
        self._slot = self._slot_of(self._since)
        for explanation in reversed(self._router.recent(None, _HIT_WINDOW)):
            if explanation.timeline is not None:
                self._count_hit(explanation.timeline)
        self._workers = self._rows(1.0)

    def _end(self) -> None:
        for unwatch in self._unwatch:
            unwatch()
        self._forget()

    def _reported(self, report: LoadReport) -> None:
        prefilled, decoded = self._computed.get(report.worker, (0, 0))
        for step in report.steps:
            prefilled += step.prefill_tokens
            decoded += step.batch
        self._computed[report.worker] = prefilled, decoded

    def _on_ended(self, timeline: Timeline) -> None:
        self._num_ended += 1
        self._num_failed += timeline.code not in ("ok", "cancelled")
        if len(self._ended) < _MOST_KEPT:
            self._ended.append(timeline)
        self._count_hit(timeline)

    def _count_hit(self, timeline: Timeline) -> None:
        if timeline.prefill is None or timeline.ttft_s is None:
            return
        self._window.append((timeline.prefill, timeline.cached_tokens, timeline.prompt_tokens))
        self._add_hit(timeline.prefill, timeline.cached_tokens, timeline.prompt_tokens)
        if len(self._window) > _HIT_WINDOW:
            worker, cached, prompt = self._window.popleft()
            self._add_hit(worker, -cached, -prompt)

    def _add_hit(self, worker: WorkerId, cached: int, prompt: int) -> None:
        before = self._hits[worker]
        self._hits[worker] = before[0] + cached, before[1] + prompt
        if not self._hits[worker][1]:
            del self._hits[worker]

    # --- telling ---------------------------------------------------------------------------------------------------

    async def _until_tick(self) -> bool:
        """Whether there are more."""
        due_s = PERIOD_S - self._clock() % PERIOD_S + _LATE_S
        try:
            async with asyncio.timeout(due_s):
                await self._stopped.wait()
        except TimeoutError:
            return True
        return False

    def _slot_of(self, now: float) -> int:
        return int(now / PERIOD_S)

    def _advance(self) -> None:
        """Make the next delta, unless another watcher has done so in this tick."""
        now = self._clock()
        if self._slot_of(now) == self._slot:
            return
        before, self._workers = self._workers, self._rows(max(now - self._since, 1e-3))
        self._number += 1
        workers = {name: changed(before.get(name), row) for name, row in self._workers.items()}
        told = {
            "workers": {name: fields for name, fields in workers.items() if fields},
            "gone": sorted(before.keys() - self._workers.keys()),
            "interval_s": round(now - self._since, 3),
            "ended": {"count": self._num_ended, "failed": self._num_failed},
            "handovers": handover_rows(self._ended, _MOST_PAIRS),
            "requests": self._told(_sample(self._ended, _MOST_REQUESTS)),
        }
        self._delta = self._event("delta", told)
        self._since, self._slot = now, self._slot_of(now)
        self._computed, self._ended = {}, []
        self._num_ended = self._num_failed = 0

    def _whole(self) -> bytes:
        recent = [found.timeline for found in self._router.recent(None, _FIRST_REQUESTS) if found.timeline is not None]
        told = {
            "about": self._about,
            "period_s": PERIOD_S,
            "workers": self._workers,
            "requests": self._told(list(reversed(recent))),
        }
        return self._event("state", told)

    def _event(self, kind: str, told: dict[str, Any]) -> bytes:
        told |= {"seq": self._number, "at": round(self._wall_clock(), 3), "totals": self._totals()}
        return b"event: %b\nid: %d\ndata: %b\n\n" % (kind.encode(), self._number, msgspec.json.encode(told))

    def _totals(self) -> dict[str, Any]:
        """What is small enough to be told each time."""
        found = self._routing.in_force
        cached, prompt = total_hits(self._hits)
        return {
            "num_waiting": self._dispatcher.num_waiting,
            "hit_tokens": cached,
            "prompt_tokens": prompt,
            "warnings": list(self._fleet.splits.values()),
            "policy": found.policy.name,
            "slos": {
                "ttft_s": found.settings.slo_ttft_s,
                "itl_s": found.settings.slo_itl_s,
                "models": {name: asdict(slos) for name, slos in found.settings.models.items()},
            },
            "num_watchers": self._num_watchers,
        }

    def _rows(self, seconds: float) -> dict[WorkerId, WorkerRow]:
        views = {view.worker: view for view in self._router.workers(now=self._clock())}
        rows = {}
        for worker in self._fleet.statuses():
            name = WorkerId(worker.worker)
            prefilled, decoded = self._computed.get(name, (0, 0))
            hits = self._hits.get(name, (0, 0))
            rates = prefilled / seconds, decoded / seconds
            rows[name] = worker_row(worker, views.get(name), rates=rates, hits=hits)
        return rows

    def _told(self, timelines: list[Timeline]) -> list[Any]:
        zero = self._wall_clock() - self._clock()
        return [request_row(timeline, received_at=zero + timeline.received_at) for timeline in timelines]


def _sample(timelines: list[T], most: int) -> list[T]:
    """Evenly drawn, in order, the last one among them."""
    if len(timelines) <= most:
        return timelines
    return [timelines[(number + 1) * len(timelines) // most - 1] for number in range(most)]
