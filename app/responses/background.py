"""Responses that run without their clients: each in one gateway, and known to all.

The gateway that runs one answers questions about it under a subject of its own. Who finds nobody there knows that the
response will not end any more. What a response's client would have read is kept as it comes, in pieces.

| who        | does                                                                                            |
|------------|-------------------------------------------------------------------------------------------------|
| POST       | saves `in_progress`, starts the run, answers                                                    |
| the run    | appends events; at its end saves the response and an empty piece, which ends the stream         |
| GET        | reads; asks the gateway of one in progress; saves `failed` where there is none                  |
| cancel     | asks that gateway, which saves `cancelled`; where there is none, saves it itself                |
| DELETE     | the same with `discard`, after which the run saves nothing                                      |
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

import msgspec
import structlog

from app.responses.ending import failed_body, taken_apart, with_status
from app.responses.store import NotKept, ResponseStore, StoredResponse
from app.serving import effects as do
from app.serving.errors import GatewayStopping
from app.serving.relay import Response
from app.serving.request import GatewayRequest
from planes.events import EventPlaneUnavailable, NobodyListens, Reply
from planes.keyed import ValueTooLarge

_log = structlog.get_logger()

_BATCH_S: Final = 0.02
"""Events of so long go into one piece."""
_RETRY_S: Final = 1.0
_ASK_S: Final = 2.0
_LOST: Final = {"code": "server_error", "message": "The gateway that ran this response is gone."}


class Wish(Enum):
    """What is asked of the gateway that runs a response."""

    NOTHING = "nothing"
    """Whether it does."""
    CANCEL = "cancel"
    DISCARD = "discard"
    """To stop it and to save nothing more."""


class Question(msgspec.Struct, frozen=True):
    """Between gateways."""

    tenant: str
    response: str
    wish: Wish


class Messenger(Protocol):
    """What `planes.events.EventPlane` does."""

    def subject(self, kind: str, who: str) -> str: ...
    async def request(self, subject: str, payload: bytes = b"", *, timeout_s: float) -> Reply: ...
    async def serve(self, subject: str, kind: type[Question], answer: Callable[[Question], bytes]) -> None: ...


class Relay(Protocol):
    """What `app.serving.relay.Relay` does."""

    async def run(self, request: GatewayRequest, response: Response) -> None: ...


class Background:
    """The background responses of one gateway.

    gateway: its name, which no other one has, nor this one after its next start.
    retry_s: how long the end of a response is tried to be saved while NATS is away.  clock: a monotonic one, for that.
    """

    def __init__(
        self,
        store: ResponseStore,
        messenger: Messenger,
        relay: Relay,
        *,
        gateway: str,
        retry_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gateway = gateway
        self._store = store
        self._messenger = messenger
        self._relay = relay
        self._retry_s = retry_s
        self._clock = clock
        self._runs: dict[tuple[str, str], _Run] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`, and until all runs have ended then."""
        await self._messenger.serve(self._messenger.subject("background", self.gateway), Question, self._answer)
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await self._stopping.wait()

    async def stop(self, timeout_s: float) -> None:
        """Let the runs end, up to so many seconds; the rest is saved as failed."""
        self._stopping.set()
        running = [run.task for run in self._runs.values() if run.task is not None]
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        for run in list(self._runs.values()):
            run.stop()

    async def start(
        self, job: GatewayRequest, record: StoredResponse, items: bytes, slots: contextlib.ExitStack
    ) -> None:
        """Save and run it; on return it goes on without whoever called.  Args:  slots: closed at its end.

        Raises:  NotKept, ValueTooLarge: it does not run.
        """
        if self._tasks is None or self._stopping.is_set():
            raise NotKept("'background'", "the gateway is not running")
        await self._store.save(job.tenant, job.format.response_id, record, items)
        run = _Run(job, record, self._store)
        self._runs[job.tenant, job.format.response_id] = run
        run.task = self._tasks.create_task(self._serve(run, slots))

    async def find(self, tenant: str, response: str, wish: Wish = Wish.NOTHING) -> StoredResponse:
        """A response as it is, after what was wished; one that nobody runs any more has failed.

        Raises:  ResponseNotFound, NotKept.
        """
        record = await self._store.get(tenant, response)
        if record.is_final:
            return record
        question = msgspec.msgpack.encode(Question(tenant, response, wish))
        subject = self._messenger.subject("background", record.gateway)
        async with self._store.changes(tenant, response) as changes:
            try:
                is_there = (await self._messenger.request(subject, question, timeout_s=_ASK_S)).data == b"1"
            except NobodyListens:
                is_there = False
            except EventPlaneUnavailable:
                return record  # nobody knows
            if is_there and wish is Wish.NOTHING:
                return record
            while is_there and not (record := await self._store.get(tenant, response)).is_final:
                if wish is Wish.DISCARD:
                    return record
                try:
                    await changes.next(_ASK_S)
                except EventPlaneUnavailable:
                    return record
        latest = await self._store.get(tenant, response)  # it may have ended while we asked
        return latest if latest.is_final else await self._abandoned(tenant, response, latest, wish)

    async def _abandoned(self, tenant: str, response: str, record: StoredResponse, wish: Wish) -> StoredResponse:
        if wish is Wish.NOTHING:
            body = with_status(record.body, "failed", _LOST)
        else:
            body = with_status(record.body, "cancelled")
        ended = msgspec.structs.replace(record, body=body)
        await self._store.save(tenant, response, ended)
        return ended

    def _answer(self, question: Question) -> bytes:
        run = self._runs.get((question.tenant, question.response))
        if run is not None and question.wish is not Wish.NOTHING:
            run.cancel(is_discarded=question.wish is Wish.DISCARD)
        return b"0" if run is None else b"1"

    async def _serve(self, run: "_Run", slots: contextlib.ExitStack) -> None:
        name = run.job.tenant, run.job.format.response_id
        try:
            with slots:
                if not run.is_ended:
                    async with asyncio.TaskGroup() as tasks:
                        run.answering = tasks.create_task(self._relay.run(run.job, run))
                        if run.record.is_streamed:
                            tasks.create_task(run.write_events())
            await run.save(self._retry_s, self._clock)
        except Exception:  # noqa: BLE001 - our own bug: it is this response's alone
            _log.exception("response.bug", response=name[1])
        finally:
            del self._runs[name]


class _Run:
    """One background response: to the relay it is the client, who reads everything and never goes."""

    def __init__(self, job: GatewayRequest, record: StoredResponse, store: ResponseStore) -> None:
        self.job = job
        self.record = record
        self.task: asyncio.Task[None] | None = None
        self.answering: asyncio.Task[None] | None = None
        self.is_begun = self.is_ended = self.is_gone = False
        self._is_discarded = False
        self._store = store
        self._body: bytes | None = None
        self._events = bytearray()
        """Those that are not stored yet."""
        self._num_events = self._num_bytes = self._num_pieces = 0
        self._news = asyncio.Event()

    # --- for the relay -----------------------------------------------------------------------------------------------

    def begin(self, headers: do.Headers) -> None:
        del headers
        self.is_begun = True

    def write(self, payload: bytes) -> None:
        self._num_bytes += len(payload)
        if self._num_bytes <= self._store.max_bytes:
            self._num_events += payload.count(b"\n\n")
            self._events += payload
            self._news.set()

    def end(self, last: bytes = b"") -> None:
        ending = taken_apart(last)
        if ending.before:
            self.write(ending.before)
        self._end(ending.body)

    def whole(self, status: int, headers: do.Headers, body: bytes) -> None:
        del status, headers
        self._end(body)

    def fail(self, exc: Exception, headers: do.Headers) -> None:
        del headers
        self._end(failed_body(self.job.format, exc))

    def keep_alive(self) -> None:
        """Nobody waits."""

    def _end(self, body: bytes) -> None:
        self.is_begun = self.is_ended = True
        self._body = body
        self._news.set()

    # --- for those who stop it ---------------------------------------------------------------------------------------

    def cancel(self, *, is_discarded: bool) -> None:
        """Nobody wants it any more."""
        self._is_discarded = self._is_discarded or is_discarded
        if not self.is_ended:
            self.is_gone = True
            self._end(with_status(self.record.body, "cancelled"))
            if self.answering is not None:
                self.answering.cancel()

    def stop(self) -> None:
        """The gateway stops: the relay says what that means."""
        if self.answering is None:
            self.fail(GatewayStopping(), ())
        elif not self.is_ended:
            self.answering.cancel()

    # --- to the store ------------------------------------------------------------------------------------------------

    async def write_events(self) -> None:
        """Store them as they come, until the last one; what cannot be stored now waits."""
        while not (self.is_ended and not self._events):
            await self._news.wait()
            self._news.clear()
            while self._events:
                piece = bytes(self._events[: self._store.piece_bytes])
                try:
                    await self._append(piece)
                except NotKept as exc:
                    if self.is_ended:
                        _log.warning("response.events_not_saved", response=self.job.format.response_id, reason=str(exc))
                        return
                    await asyncio.sleep(_RETRY_S)
                else:
                    del self._events[: len(piece)]
            if not self.is_ended:
                await asyncio.sleep(_BATCH_S)

    async def save(self, retry_s: float, clock: Callable[[], float]) -> None:
        """The end."""
        response = self.job.format.response_id
        body = self._body or with_status(self.record.body, "failed", _LOST)
        num_events = self._num_events if self.record.is_streamed else None
        record = msgspec.structs.replace(
            self.record, body=body, num_bytes=self.record.num_bytes + len(body), gateway="", num_events=num_events
        )
        deadline = clock() + retry_s
        while not self._is_discarded:
            try:
                await self._store.save(self.job.tenant, response, record)
                if self.record.is_streamed:
                    await self._append(b"")
                break
            except ValueTooLarge as exc:
                told = {"code": "server_error", "message": f"The response cannot be kept: {exc}."}
                record = msgspec.structs.replace(record, body=with_status(self.record.body, "failed", told))
            except NotKept as exc:
                _log.warning("response.not_saved", response=response, reason=str(exc))
                if clock() >= deadline:
                    return
                await asyncio.sleep(_RETRY_S)

    async def _append(self, piece: bytes) -> None:
        if not self._is_discarded:
            await self._store.append(self.job.tenant, self.job.format.response_id, self._num_pieces, piece)
            self._num_pieces += 1
