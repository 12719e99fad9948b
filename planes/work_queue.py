"""The work queue of prefill jobs (`--prefill-dispatch queue`): one JetStream stream a namespace, one consumer a model.

A job is stored when `submit` returns, given to one worker at a time, and gone when that worker acknowledges it. One
that is not acknowledged within `ack_wait_s` (its worker died) is given to another, and to another again: JetStream
never drops it in silence, so that a worker can tell its gateway when too many have failed. Ages are by NATS' clock.
JetStream's API is JSON over NATS: https://docs.nats.io/reference/reference-protocols/nats_api_reference
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from planes.events import EventPlane, EventPlaneUnavailable, Inbox, JetStreamRefused, Reply
from planes.wire.errors import Rejected
from planes.wire.names import subject_token

_STREAM_FULL, _NO_MESSAGE = 10077, 10037
"""JetStream's error codes: at a limit, with discard=new; nothing found."""

_CLOCK_S, _MAX_READING_S = 60.0, 1.0
"""NATS' clock is read so often; a reading that took longer is repeated."""


class PrefillQueueFull(Rejected):
    """The queue is at its limit of jobs or bytes, or the job is larger than a message may be."""

    code = "prefill_queue_full"


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Settings of the queue; all gateways and workers of a namespace should have the same."""

    ack_wait_s: float = 5.0
    """A worker that has not said for so long that it is at the job has died. Three times as often it says so."""
    max_deliveries: int = 3
    """After so many workers took a job and none finished it, nobody computes it any more: it may be what kills them.
    The next that gets it says so."""
    max_age_s: float = 600.0
    max_jobs: int = 10_000
    max_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class QueueStats:
    """depth: jobs that no worker has taken.  num_in_progress: taken, not acknowledged.  Age of the oldest untaken."""

    depth: int
    num_in_progress: int
    oldest_age_s: float


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """A job that this worker has for `ack_wait_s`, from each `in_progress` on anew.

    num_deliveries: 1 the first time.  The methods raise EventPlaneUnavailable; then the job will be delivered again.
    """

    payload: bytes
    job_id: str
    num_deliveries: int
    age_s: float
    _plane: EventPlane
    _reply: str

    async def ack(self) -> None:
        """Done; the job leaves the queue."""
        await self._plane.send(self._reply, b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        """Not done; deliver it again, after `delay_s`."""
        await self._plane.send(self._reply, b"-NAK " + json.dumps({"delay": _nanoseconds(delay_s)}).encode())

    async def in_progress(self) -> None:
        """Still at it."""
        await self._plane.send(self._reply, b"+WPI")


class ServerClock:
    """NATS' clock: read from its answers, counted on by our monotonic one. Those of gateways and workers say nothing of
    when a job was stored.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ahead_s = 0.0
        self._next_reading = -math.inf

    def asked(self) -> float:
        """Now, for `read`: before the question is sent."""
        return self._clock()

    @property
    def is_due(self) -> bool:
        """Whether to ask again: clocks drift and are set, and a reading that took long says little."""
        return self._clock() >= self._next_reading

    def read(self, told: str, asked_at: float) -> None:
        """told: the time in an answer, RFC 3339.  asked_at: what `asked` gave."""
        now = self._clock()
        self._ahead_s = _seconds(told) - now
        self._next_reading = now + _CLOCK_S if now - asked_at < _MAX_READING_S else -math.inf

    def age_s(self, stored_at: float) -> float:
        """stored_at: seconds since 1970 by NATS' clock."""
        return max(0.0, self._clock() + self._ahead_s - stored_at)


class PrefillQueue:
    """The prefill jobs of one namespace, of all models. `clock` is a monotonic one."""

    def __init__(
        self, plane: EventPlane, limits: JobLimits | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plane = plane
        self.limits = limits or JobLimits()
        self._clock = ServerClock(clock)
        self._stream = f"headrace-{plane.namespace}-prefill"
        self._known: set[str] = set()
        plane.on_connect(self._known.clear)  # the server may have lost its store

    async def submit(self, model: str, payload: bytes, job_id: str, *, timeout_s: float = 2.0) -> None:
        """Queue a job; on return it is stored. The same id within two minutes is stored once.

        Raises:  PrefillQueueFull; EventPlaneUnavailable: it may be queued or not.
        """
        if len(payload) > self._plane.max_message_bytes - 1024:  # headers count, too
            limit = self._plane.max_message_bytes
            raise PrefillQueueFull(f"a prefill job of {len(payload)} bytes; NATS takes messages of {limit} bytes")
        await self._ensure(model)
        headers = {"Nats-Msg-Id": job_id}
        try:
            await self._plane.store(
                self._plane.subject("prefill", model), payload, headers=headers, timeout_s=timeout_s
            )
        except JetStreamRefused as exc:
            if exc.err_code != _STREAM_FULL:
                raise
            limits = f"{self.limits.max_jobs} jobs or {self.limits.max_bytes} bytes"
            raise PrefillQueueFull(f"the prefill queue is at its limit of {limits}") from exc
        except EventPlaneUnavailable:
            self._known.discard(model)  # perhaps somebody deleted the stream: look again next time
            raise

    async def pull(self, model: str, max_batch: int, *, timeout_s: float) -> list[PrefillJob]:
        """Up to `max_batch` jobs: what is queued now, else the next one that comes within `timeout_s`, else none.

        Raises:  EventPlaneUnavailable.
        """
        await self._ensure(model)
        if self._clock.is_due:
            await self._consumer(model)
        # A new inbox each time: what would be delivered to a cancelled pull goes to somebody else.
        async with self._plane.inbox() as inbox:
            jobs = await self._pull(inbox, model, {"batch": max_batch, "no_wait": True}, max_batch, 5.0)
            if not jobs:
                wait = {"batch": 1, "expires": _nanoseconds(timeout_s)}
                jobs = await self._pull(inbox, model, wait, 1, timeout_s + 5.0)
            return jobs

    async def stats(self, model: str) -> QueueStats:
        """Raises:  EventPlaneUnavailable."""
        await self._ensure(model)
        consumer = await self._consumer(model)
        depth, in_progress = consumer["num_pending"], consumer["num_ack_pending"]
        if not depth:
            return QueueStats(0, in_progress, 0.0)
        next_one = {
            "seq": consumer["delivered"]["stream_seq"] + 1,
            "next_by_subj": self._plane.subject("prefill", model),
        }
        try:
            oldest = await self._plane.jetstream(f"STREAM.MSG.GET.{self._stream}", next_one)
        except JetStreamRefused as exc:
            if exc.err_code != _NO_MESSAGE:  # taken since
                raise
            return QueueStats(0, in_progress, 0.0)
        return QueueStats(depth, in_progress, self._clock.age_s(_seconds(oldest["message"]["time"])))

    async def _consumer(self, model: str) -> dict[str, Any]:
        """What NATS says of the model's consumer, and what time it is there."""
        asked_at = self._clock.asked()
        told = await self._plane.jetstream(f"CONSUMER.INFO.{self._stream}.{subject_token(model)}")
        self._clock.read(told["ts"], asked_at)
        return told

    async def _pull(
        self, inbox: Inbox, model: str, request: dict[str, Any], count: int, timeout_s: float
    ) -> list[PrefillJob]:
        """Ask for `count` jobs; a status (no messages, expired) ends the answer early."""
        next_jobs = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{subject_token(model)}"
        await self._plane.send(next_jobs, json.dumps(request).encode(), reply=inbox.subject)
        jobs: list[PrefillJob] = []
        while len(jobs) < count:
            reply = await inbox.next(timeout_s)
            if reply.status is not None:
                if reply.status == "503":
                    self._known.discard(model)
                break
            jobs.append(self._job(reply))
        return jobs

    def _job(self, reply: Reply) -> PrefillJob:
        # $JS.ACK.[domain.account.]stream.consumer.deliveries.stream_seq.consumer_seq.time_ns.pending[.token]
        tokens = reply.reply.split(".")
        first = tokens.index(self._stream) + 2
        age_s = self._clock.age_s(int(tokens[first + 3]) / 1e9)
        job_id = reply.headers.get("Nats-Msg-Id", "")
        return PrefillJob(reply.data, job_id, int(tokens[first]), age_s, self._plane, reply.reply)

    async def _ensure(self, model: str) -> None:
        """The stream and the model's consumer, created or brought to our settings; once a connection."""
        if model in self._known:
            return
        limits, consumer = self.limits, subject_token(model)
        stream = {
            "name": self._stream,
            "subjects": [self._plane.subjects("prefill")],
            "retention": "workqueue",
            "discard": "new",
            "storage": "file",
            "max_age": _nanoseconds(limits.max_age_s),
            "max_msgs": limits.max_jobs,
            "max_bytes": limits.max_bytes,
            "duplicate_window": _nanoseconds(min(120.0, limits.max_age_s)),
        }
        config = {
            "durable_name": consumer,
            "filter_subject": self._plane.subject("prefill", model),
            "ack_policy": "explicit",
            "ack_wait": _nanoseconds(limits.ack_wait_s),
            "max_deliver": -1,
            "max_ack_pending": limits.max_jobs,
        }
        await self._plane.ensure_stream(stream)
        await self._plane.jetstream(
            f"CONSUMER.DURABLE.CREATE.{self._stream}.{consumer}", {"stream_name": self._stream, "config": config}
        )
        self._known.add(model)


def _seconds(told: str) -> float:
    return datetime.fromisoformat(told).timestamp()


def _nanoseconds(seconds: float) -> int:
    return math.ceil(seconds * 1e9)
