"""Takes prefill jobs from the queue when there is room, and runs each like a prefill leg that a gateway sent.

    pulled ── too old, or unwanted ──► acknowledged, nothing else
       └─► taken (the gateway is told) ── computed ──► the gateway is told ──► acknowledged
                     │  └── unwanted meanwhile ──► engine told to stop, acknowledged
                     └── this worker stops ──► given back to the queue at once

While a job is computed the queue is told so three times as often as it asks for; a worker that dies says nothing, and
the job goes to another one.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog

from planes.events import EventPlaneUnavailable
from planes.wire.frames import Delta, Done, Failed, Generate, StreamId
from planes.wire.messages import RequestId, WorkerId
from planes.wire.prefill_queue import PrefillNews, PrefillUnwanted, QueuedPrefill
from planes.work_queue import JobLimits, PrefillJob
from workers.engine.base import EngineLoad

_log = structlog.get_logger()

_ROOM_POLL_S = 0.01
_PULL_TIMEOUT_S = 30.0
_RETRY_S = 0.5
_MAX_UNWANTED = 4096
_STREAM = StreamId(0)
_ANOTHERS = frozenset({"worker_busy", "worker_draining", "worker_stopping", "engine_died"})
"""Failures that say nothing about the job: another worker shall have it."""


class Queue(Protocol):
    """What is needed of `planes.work_queue.PrefillQueue`."""

    @property
    def limits(self) -> JobLimits: ...
    async def pull(self, model: str, max_batch: int, *, timeout_s: float) -> list[PrefillJob]: ...


class Plane(Protocol):
    """What is needed of `planes.events.EventPlane`."""

    def subject(self, kind: str, who: str) -> str: ...
    async def send(self, subject: str, payload: bytes) -> None: ...
    async def subscribe(
        self, subject: str, kind: type[PrefillUnwanted], callback: Callable[[PrefillUnwanted], None]
    ) -> None: ...


class Server(Protocol):
    """What is needed of `workers.server.WorkerServer`."""

    def generate(self, connection: "Run", request: Generate) -> None: ...
    def cancel(self, connection: "Run", stream: StreamId) -> None: ...


class LoadedEngine(Protocol):
    """What is needed of the engine."""

    def load(self) -> EngineLoad: ...
    def abort(self, request: RequestId) -> None: ...


class Run:
    """A job under way; the server's connection for its one answer."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Done | Failed | None] = asyncio.get_running_loop().create_future()
        """None: nobody wants it any more."""

    def post(self, item: Delta | Done | Failed) -> None:
        if not isinstance(item, Delta) and not self.ended.done():
            self.ended.set_result(item)


class Puller:
    """One worker's hand in the queue of its model.

    pull_ahead: prompts that may wait for the engine; with fewer there is room for another job.
    """

    def __init__(
        self,
        worker: WorkerId,
        model: str,
        queue: Queue,
        plane: Plane,
        server: Server,
        engine: LoadedEngine,
        *,
        pull_ahead: int,
    ) -> None:
        self._worker = worker
        self._model = model
        self._queue = queue
        self._plane = plane
        self._server = server
        self._engine = engine
        self._pull_ahead = pull_ahead
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(QueuedPrefill).decode
        self._runs: dict[RequestId, Run] = {}
        self._unwanted: OrderedDict[RequestId, None] = OrderedDict()
        self._changed = asyncio.Event()
        self._pulling: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        """Pull and compute until `stop`, and until what was pulled has ended."""
        await self._plane.subscribe(self._plane.subject("unwanted", self._model), PrefillUnwanted, self._drop)
        async with asyncio.TaskGroup() as group:
            if not self._is_stopped:
                self._pulling = group.create_task(self._pull(group))

    def stop(self) -> None:
        """Pull no more."""
        self._is_stopped = True
        if self._pulling is not None:
            self._pulling.cancel()

    async def until_idle(self, timeout_s: float) -> None:
        """Wait until the outcome of every job has been told, for so long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def _pull(self, group: asyncio.TaskGroup) -> None:
        is_away = False
        while True:
            room = await self._room()
            try:
                jobs = await self._queue.pull(self._model, room, timeout_s=_PULL_TIMEOUT_S)
            except EventPlaneUnavailable as exc:
                if not is_away:
                    _log.warning("prefill_queue.unavailable", reason=str(exc))
                is_away = True
                await asyncio.sleep(_RETRY_S)
                continue
            is_away = False
            for job in jobs:
                self._idle.clear()
                group.create_task(self._serve(job))
            await asyncio.sleep(0)  # let them reach the engine, whose load then counts them

    async def _room(self) -> int:
        """Wait for room.  Returns:  for how many jobs there is some, 1 or more."""
        while True:
            room = self._pull_ahead - self._engine.load().num_waiting
            if room > 0:
                return room
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ROOM_POLL_S):
                    await self._changed.wait()

    # --- one job -------------------------------------------------------------------------------------------------

    async def _serve(self, job: PrefillJob) -> None:
        name = RequestId(job.job_id)
        if name in self._runs:
            return  # it came again because we were slow to say that we are at it
        run = self._runs[name] = Run()
        try:
            try:
                wanted = self._decode(job.payload)
            except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
                _log.warning("prefill_job.malformed", request_id=name, reason=str(exc))
                await job.ack()
            else:
                await self._compute(job, name, wanted, run)
        except EventPlaneUnavailable as exc:  # it will come again, here or elsewhere
            _log.warning("prefill_job.unsettled", request_id=name, reason=str(exc))
        finally:
            del self._runs[name]
            self._changed.set()
            if not self._runs:
                self._idle.set()

    async def _compute(self, job: PrefillJob, name: RequestId, wanted: QueuedPrefill, run: Run) -> None:
        timeout_s = wanted.generate.timeout_s - job.age_s
        if name in self._unwanted or timeout_s <= 0:
            _log.info("prefill_job.dropped", request_id=name, age_s=round(job.age_s, 3))
            await job.ack()
            return
        request = msgspec.structs.replace(wanted.generate, request=name, stream=_STREAM, timeout_s=timeout_s)
        self._server.generate(run, request)
        news = PrefillNews(
            name, self._model, self._worker, is_last_try=job.num_deliveries >= self._queue.limits.max_deliveries
        )
        try:
            if not run.ended.done():
                await self._send(wanted.answer_to, news)
            outcome = await self._ended(job, run)
        finally:
            self._server.cancel(run, _STREAM)  # nothing happens if it has ended
        if isinstance(outcome, Failed) and outcome.code in _ANOTHERS and not news.is_last_try:
            await job.nak()
            return
        if outcome is not None:
            done, failed = (outcome, None) if isinstance(outcome, Done) else (None, outcome)
            await self._answer(name, wanted.answer_to, msgspec.structs.replace(news, done=done, failed=failed))
        await job.ack()

    async def _ended(self, job: PrefillJob, run: Run) -> Done | Failed | None:
        """Wait for the end, and tell the queue meanwhile that somebody is at it."""
        while True:
            await asyncio.wait([run.ended], timeout=self._queue.limits.ack_wait_s / 3)
            if run.ended.done():
                return run.ended.result()
            with contextlib.suppress(EventPlaneUnavailable):  # worst of all it is computed twice
                await job.in_progress()

    async def _answer(self, name: RequestId, subject: str, news: PrefillNews) -> None:
        """Tell the outcome. After `ack_wait_s` somebody else gets the job, and what we keep for it is of no use."""
        try:
            async with asyncio.timeout(self._queue.limits.ack_wait_s):
                while True:
                    if await self._send(subject, news):
                        return
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            self._engine.abort(name)
            raise EventPlaneUnavailable("NATS was away too long to say what came of the job") from None

    async def _send(self, subject: str, news: PrefillNews) -> bool:
        try:
            await self._plane.send(subject, self._encode(news))
        except EventPlaneUnavailable:
            return False
        return True

    def _drop(self, message: PrefillUnwanted) -> None:
        if message.worker not in (None, self._worker):
            return
        run = self._runs.get(message.job)
        if run is not None:
            self._server.cancel(run, _STREAM)
            if not run.ended.done():
                run.ended.set_result(None)
        else:
            self._engine.abort(message.job)  # what it kept for the decode worker
        if message.worker is None:
            self._unwanted[message.job] = None
            if len(self._unwanted) > _MAX_UNWANTED:
                self._unwanted.popitem(last=False)
