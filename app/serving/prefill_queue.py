"""Prefill legs by way of the queue (`--prefill-dispatch queue`): some worker with room takes them.

    submitted ── taken ── answered once; a later answer is ignored, and its worker told to drop what it keeps
        │          └─ its worker dies: the queue gives it to another, up to the limit of tries
        ├── NATS away, queue full, nobody pulls ──► NotQueued: ask the chosen worker directly
        └── nobody waits any more ──► all workers are told, as far as NATS can be reached

Answers come over core NATS, which keeps nothing for those who are away: after an outage, however short, every job under
way is given up here and its prompt sent directly.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec
import structlog

from app.metrics import Gauge
from app.serving.errors import leg_error
from planes.events import Connects, EventPlaneUnavailable, Messenger
from planes.streams.client import WorkerLost
from planes.wire.errors import HeadraceError
from planes.wire.frames import Done, Generate
from planes.wire.messages import RequestId, WorkerId
from planes.wire.prefill_queue import OVERTRIED, PrefillNews, PrefillUnwanted, QueuedPrefill
from planes.work_queue import PrefillQueueFull, QueueStats

_log = structlog.get_logger()

_CHECK_S = 0.5
_STATS_S = 1.0
_SUBMIT_TIMEOUT_S = 1.0
_MAX_ANSWERED = 4096
_MAX_UNWANTED = 4096


class NotQueued(HeadraceError):  # noqa: N818 - names the outcome
    """The queue cannot have a prompt computed; a worker that is asked directly may."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What came of a prefill leg, and whose it was; `job`: its name in the queue, if it came through there."""

    worker: WorkerId
    done: Done
    job: RequestId | None = None


class JobQueue(Protocol):
    """What is needed of `planes.work_queue.PrefillQueue`."""

    async def submit(self, model: str, payload: bytes, job_id: str, *, timeout_s: float) -> None: ...
    async def stats(self, model: str) -> QueueStats: ...


class WorkerNews(Connects, Messenger, Protocol):
    """What is needed of `planes.events.EventPlane`."""


class Pullers(Protocol):
    """What is asked of the fleet."""

    def models(self) -> dict[str, int]: ...
    def is_pulled(self, model: str) -> bool: ...
    def is_connected(self, worker: WorkerId) -> bool: ...


@dataclass(slots=True, eq=False)
class _Waiting:
    ended: asyncio.Future[PrefillNews]
    outages: int
    taken: PrefillNews | None = None


class QueuedPrefills:
    """The jobs that one gateway has in the queue.

    gateway: names the process; no two may have the same name.  check_s: between two looks whether an answer can come.
    """

    def __init__(
        self, queue: JobQueue, plane: WorkerNews, pullers: Pullers, *, gateway: str, check_s: float = _CHECK_S
    ) -> None:
        self._queue = queue
        self._plane = plane
        self._pullers = pullers
        self._check_s = check_s
        self._answer_to = plane.subject("prefilled", gateway)
        self._loop = asyncio.get_running_loop()
        self._encode = msgspec.msgpack.Encoder().encode
        self._waiting: dict[RequestId, _Waiting] = {}
        self._answered: OrderedDict[RequestId, WorkerId] = OrderedDict()
        self._unwanted: deque[tuple[str, PrefillUnwanted]] = deque(maxlen=_MAX_UNWANTED)
        self._has_unwanted = asyncio.Event()
        self._num_connects = 0
        self._stats: dict[str, QueueStats] = {}
        plane.on_connect(self._connected)

    async def run(self) -> None:
        """Listen for answers, tell workers what is not wanted, look at the queue; until cancelled."""
        await self._plane.subscribe(self._answer_to, PrefillNews, self._take)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell())
            tasks.create_task(self._watch())

    async def prefill(self, model: str, request: Generate) -> Prefilled:
        """Have some worker compute a prefill leg.

        Raises:  NotQueued; WorkerLost, and what a worker's Failed stands for (`app/serving/errors.py`).
        """
        job = RequestId(f"{request.request}.q")  # beside it the same leg may be run directly
        waiting = _Waiting(self._loop.create_future(), self._num_connects)
        self._waiting[job] = waiting
        try:
            await self._submit(model, job, request)
            while not waiting.ended.done():
                await asyncio.wait([waiting.ended], timeout=self._check_s)
                if not waiting.ended.done():
                    self._check(model, waiting)
        except BaseException:
            if not waiting.ended.done():
                self._drop(model, PrefillUnwanted(job))
            elif waiting.ended.exception() is None:  # it came, and nobody waits any more
                self._drop(model, PrefillUnwanted(job, waiting.ended.result().worker))
            raise
        finally:
            del self._waiting[job]
        news = waiting.ended.result()
        if news.failed is not None and news.failed.code == OVERTRIED:  # it is not the fault of the worker that says so
            raise NotQueued(news.failed.code, news.failed.message)
        if news.failed is not None:
            raise leg_error(news.failed, news.worker)
        if news.done is None:
            raise TypeError("an answer has neither of its two")
        return Prefilled(news.worker, news.done, job)

    def release(self, model: str, job: RequestId, worker: WorkerId) -> None:
        """The KV cache that `worker` keeps for this job will not be fetched."""
        self._drop(model, PrefillUnwanted(job, worker))

    def gauges(self) -> Iterator[Gauge]:
        """The queue as it was when last looked at; nothing while NATS cannot tell."""
        for model, stats in self._stats.items():
            label = (("model", model),)
            yield Gauge("prefill_queue_depth", "Prefill jobs that no worker has taken.", stats.depth, label)
            yield Gauge("prefill_queue_in_progress", "Prefill jobs taken and not done.", stats.num_in_progress, label)
            yield Gauge(
                "prefill_queue_oldest_seconds", "Age of the oldest prefill job not taken.", stats.oldest_age_s, label
            )

    # --- one job -------------------------------------------------------------------------------------------------

    async def _submit(self, model: str, job: RequestId, request: Generate) -> None:
        if not self._pullers.is_pulled(model):
            raise NotQueued("prefill_queue_unserved", f"no worker takes prefill jobs of {model!r} from the queue")
        payload = self._encode(QueuedPrefill(msgspec.structs.replace(request, request=job), self._answer_to))
        try:
            await self._queue.submit(model, payload, job, timeout_s=_SUBMIT_TIMEOUT_S)
        except (PrefillQueueFull, EventPlaneUnavailable) as exc:
            raise NotQueued(exc.code, str(exc)) from exc

    def _check(self, model: str, waiting: _Waiting) -> None:
        """Whether an answer can still come.  Raises:  NotQueued, WorkerLost."""
        if not self._plane.is_connected or waiting.outages != self._num_connects:
            raise NotQueued(EventPlaneUnavailable.code, "NATS was away while the prefill job was in the queue")
        taken = waiting.taken
        if taken is not None and taken.is_last_try and not self._pullers.is_connected(taken.worker):
            raise WorkerLost(taken.worker, "it was the last to get this prefill job")
        if not self._pullers.is_pulled(model):
            raise NotQueued("prefill_queue_unserved", f"no worker of {model!r} is left that takes prefill jobs")

    def _take(self, news: PrefillNews) -> None:
        waiting = self._waiting.get(news.job)
        if waiting is not None and not waiting.ended.done():
            if news.done is None and news.failed is None:
                waiting.taken = news
                return
            self._answered[news.job] = news.worker
            if len(self._answered) > _MAX_ANSWERED:
                self._answered.popitem(last=False)
            waiting.ended.set_result(news)
        elif news.done is not None and self._answered.get(news.job) != news.worker:
            _log.info("prefill_job.answered_late", request_id=news.job, worker=news.worker)
            self._drop(news.model, PrefillUnwanted(news.job, news.worker))

    # --- what runs all the time ----------------------------------------------------------------------------------

    def _connected(self) -> None:
        self._num_connects += 1
        self._has_unwanted.set()

    def _drop(self, model: str, message: PrefillUnwanted) -> None:
        self._unwanted.append((model, message))
        self._has_unwanted.set()

    async def _tell(self) -> None:
        while True:
            await self._has_unwanted.wait()
            self._has_unwanted.clear()
            while self._unwanted and self._plane.is_connected:
                model, message = self._unwanted.popleft()
                try:
                    await self._plane.send(self._plane.subject("unwanted", model), self._encode(message))
                except EventPlaneUnavailable as exc:
                    _log.debug("prefill_job.not_dropped", request_id=message.job, reason=str(exc))

    async def _watch(self) -> None:
        while True:
            found: dict[str, QueueStats] = {}
            for model in self._pullers.models() if self._plane.is_connected else ():
                try:
                    found[model] = await self._queue.stats(model)
                except EventPlaneUnavailable as exc:
                    _log.debug("prefill_queue.unknown", model=model, reason=str(exc))
            self._stats = found
            await asyncio.sleep(_STATS_S)
