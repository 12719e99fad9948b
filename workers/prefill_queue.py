"""Takes prefill jobs from the queue when there is room, and runs each like a prefill leg that a gateway sent.

    pulled ── unwanted ──► acknowledged, nothing else
       ├── unreadable, too old, or tried too often ──► the gateway is told ──► acknowledged
       └─► taken (the gateway is told) ── computed ──► the gateway is told ──► acknowledged
                     │  └── unwanted meanwhile ──► engine told to stop, acknowledged
                     └── this worker stops ──► given back to the queue at once

While a job is computed the queue is told so three times as often as it asks for; a worker that dies says nothing, and
the job goes to another one. No job leaves the queue without a word to its gateway, as far as NATS can be reached.
"""

import asyncio
import contextlib
from collections import OrderedDict
from typing import Protocol

import msgspec
import structlog

from planes.events import EventPlaneUnavailable, Messenger
from planes.wire.errors import ROLE_CHANGED
from planes.wire.frames import Delta, Done, Failed, FailureKind, Generate, StreamId
from planes.wire.messages import RequestId, WorkerId
from planes.wire.prefill_queue import OVERTRIED, PrefillNews, PrefillUnwanted, QueuedPrefill
from planes.wire.unreadable import UNREADABLE
from planes.work_queue import JobLimits, PrefillJob
from workers.engine.base import EngineLoad

_log = structlog.get_logger()

_ROOM_POLL_S = 0.01
_PULL_TIMEOUT_S = 30.0
_RETRY_S = 0.5
_MAX_UNWANTED = 4096
_STREAM = StreamId(0)
_ANOTHERS = frozenset({ROLE_CHANGED, "worker_busy", "worker_draining", "worker_stopping", "engine_died"})
"""Failures that say nothing about the job: another worker shall have it."""


class PrefillJobs(Protocol):
    """What is needed of `planes.work_queue.PrefillQueue`."""

    @property
    def limits(self) -> JobLimits: ...
    async def pull(self, model: str, max_batch: int, *, timeout_s: float) -> list[PrefillJob]: ...


class LegRunner(Protocol):
    """What is needed of `workers.server.WorkerServer`."""

    def generate(self, connection: "QueuedLeg", request: Generate) -> None: ...
    def cancel(self, connection: "QueuedLeg", stream: StreamId) -> None: ...


class LoadedEngine(Protocol):
    """What is needed of the engine."""

    def load(self) -> EngineLoad: ...
    def abort(self, request: RequestId) -> None: ...


class _Addressed(msgspec.Struct):
    """What can be read of a job that is otherwise a later version's."""

    answer_to: str


class QueuedLeg:
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
        queue: PrefillJobs,
        plane: Messenger,
        server: LegRunner,
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
        self._legs: dict[RequestId, QueuedLeg] = {}
        self._unwanted: OrderedDict[RequestId, None] = OrderedDict()
        self._changed = asyncio.Event()
        self._pulling: asyncio.Task[None] | None = None
        self._may_pull = asyncio.Event()
        self._may_pull.set()
        self._is_stopped = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        """Pull and compute until `stop`, and until what was pulled has ended."""
        await self._plane.subscribe(self._plane.subject("unwanted", self._model), PrefillUnwanted, self._drop)
        async with asyncio.TaskGroup() as group:
            while not self._is_stopped:
                await self._may_pull.wait()
                if not self._is_stopped:
                    self._pulling = group.create_task(self._pull(group))
                    await asyncio.wait([self._pulling])

    def pause(self) -> None:
        """Pull no more until `resume`; what was pulled is computed."""
        self._may_pull.clear()
        if self._pulling is not None:
            self._pulling.cancel()

    def resume(self) -> None:
        """Pull again."""
        self._may_pull.set()

    def stop(self) -> None:
        """Pull no more, ever."""
        self._is_stopped = True
        self.pause()
        self._may_pull.set()

    async def until_idle(self, timeout_s: float) -> None:
        """Wait until the outcome of every job has been told, for so long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def _pull(self, group: asyncio.TaskGroup) -> None:
        is_away = False
        # Looked at, since a cancellation alone may come to nothing where an answer comes with it.
        while self._may_pull.is_set() and not self._is_stopped:
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
        if name in self._legs:
            return  # it came again because we were slow to say that we are at it
        leg = self._legs[name] = QueuedLeg()
        try:
            try:
                wanted = self._decode(job.payload)
            except UNREADABLE as exc:
                await self._refuse_unreadable(job, name, str(exc))
            else:
                await self._settle(job, name, wanted, leg)
        except EventPlaneUnavailable as exc:  # it will come again, here or elsewhere
            _log.warning("prefill_job.unsettled", request_id=name, reason=str(exc))
        finally:
            del self._legs[name]
            self._changed.set()
            if not self._legs:
                self._idle.set()

    async def _refuse_unreadable(self, job: PrefillJob, name: RequestId, reason: str) -> None:
        try:
            answer_to = msgspec.msgpack.decode(job.payload, type=_Addressed).answer_to
        except UNREADABLE:
            _log.warning("prefill_job.dropped", request_id=name, code="prefill_job_unreadable", reason=reason)
            await job.ack()
        else:
            await self._refuse(job, name, answer_to, "prefill_job_unreadable", f"the job cannot be read: {reason}")

    async def _refuse(self, job: PrefillJob, name: RequestId, answer_to: str, code: str, message: str) -> None:
        """Nobody computes this job any more, and its gateway hears why."""
        _log.warning("prefill_job.dropped", request_id=name, code=code, reason=message)
        failed = Failed(_STREAM, FailureKind.REJECTED, code, message)
        await self._answer(name, answer_to, PrefillNews(name, self._model, self._worker, failed=failed))
        await job.ack()

    async def _settle(self, job: PrefillJob, name: RequestId, wanted: QueuedPrefill, leg: QueuedLeg) -> None:
        timeout_s, most = wanted.generate.timeout_s - job.age_s, self._queue.limits.max_deliveries
        if name in self._unwanted:
            _log.info("prefill_job.dropped", request_id=name, code="unwanted", age_s=round(job.age_s, 3))
            await job.ack()
        elif timeout_s <= 0:
            message = f"the job is {job.age_s:.1f} s old and its request's time was {wanted.generate.timeout_s:g} s"
            await self._refuse(job, name, wanted.answer_to, "deadline_exceeded", message)
        elif job.num_deliveries > most:
            message = f"{job.num_deliveries - 1} workers took the job and none finished it; the limit is {most}"
            await self._refuse(job, name, wanted.answer_to, OVERTRIED, message)
        else:
            request = msgspec.structs.replace(wanted.generate, request=name, stream=_STREAM, timeout_s=timeout_s)
            await self._compute(job, request, wanted.answer_to, leg)

    async def _compute(self, job: PrefillJob, request: Generate, answer_to: str, leg: QueuedLeg) -> None:
        name = request.request
        self._server.generate(leg, request)
        news = PrefillNews(
            name, self._model, self._worker, is_last_try=job.num_deliveries >= self._queue.limits.max_deliveries
        )
        outcome: Done | Failed | None = None
        try:
            if not leg.ended.done():
                await self._send(answer_to, news)
            outcome = await self._ended(job, leg)
        finally:
            if outcome is None:
                self._server.cancel(leg, _STREAM)
        if isinstance(outcome, Failed) and outcome.code in _ANOTHERS and not news.is_last_try:
            await job.nak()
            return
        if outcome is not None:
            done, failed = (outcome, None) if isinstance(outcome, Done) else (None, outcome)
            await self._answer(name, answer_to, msgspec.structs.replace(news, done=done, failed=failed))
        await job.ack()

    async def _ended(self, job: PrefillJob, leg: QueuedLeg) -> Done | Failed | None:
        """Wait for the end, and tell the queue meanwhile that somebody is at it."""
        while True:
            await asyncio.wait([leg.ended], timeout=self._queue.limits.ack_wait_s / 3)
            if leg.ended.done():
                return leg.ended.result()
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
        leg = self._legs.get(message.job)
        if leg is not None:
            self._server.cancel(leg, _STREAM)
            if not leg.ended.done():
                leg.ended.set_result(None)
        else:
            self._engine.abort(message.job)  # what it kept for the decode worker
        if message.worker is None:
            self._unwanted[message.job] = None
            if len(self._unwanted) > _MAX_UNWANTED:
                self._unwanted.popitem(last=False)
