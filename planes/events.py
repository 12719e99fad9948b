"""The event plane: KV events, load reports and snapshots over NATS. With `events_client.py`, the only
user of nats-py.

    headrace.{ns}.kv.{worker}        KvEvents, published; lost ones are noticed by digest
    headrace.{ns}.load.{worker}      LoadReport, published
    headrace.{ns}.snapshot.{worker}  request, answered with the parts of a Snapshot
    headrace.{ns}.gateway.{gateway}  GatewayNews, published; lost ones are noticed by their numbers

NATS may come late, go away and come back: publications meanwhile are dropped and counted, requests fail at once, and
subscriptions are there again before `on_connect` is told. `work_queue.py` and `objects.py` speak JetStream's
JSON over the same connection.

Snapshots travel in parts because a message may hold 1 MB by default and a worker may hold a million blocks (8 MB).
Parts are as long as the server allows, so that every one will do as it is; other messages get their turn in between.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from planes.events_client import Client, NatsKeys
from planes.security.planes import NatsSecurity
from planes.wire.errors import HeadraceError
from planes.wire.floods import is_notable
from planes.wire.messages import GatewayNews, KvEvents, LoadReport, Snapshot, WorkerId
from planes.wire.names import check_namespace, subject_token
from planes.wire.unreadable import UNREADABLE
from planes.wire.urls import parse_nats

_log = structlog.get_logger()
_Message = TypeVar("_Message")

_PART_BYTES = 512 * 1024
"""Of a snapshot, at most and at most half of what the server takes."""
_MAX_PENDING_BYTES = 1024 * 1024
"""Unsent bytes at which publications are dropped; nats-py itself would begin to wait at 2 MB."""
_STREAM_EXISTS = 10058
"""JetStream's error code for a stream of that name with other settings."""


class EventPlaneUnavailable(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """NATS, or who should have answered over it, did not; may be tried again."""

    code = "event_plane_unavailable"


class NobodyListens(EventPlaneUnavailable):
    """NATS is there, and says at once that nobody answers on this subject."""


class JetStreamRefused(EventPlaneUnavailable):
    """JetStream answered with an error; `err_code` is its number for it."""

    def __init__(self, what: str, err_code: int, description: str) -> None:
        super().__init__(f"{what}: {description} (JetStream error {err_code})")
        self.err_code = err_code


class Connects(Protocol):
    """What tells of its connection."""

    @property
    def is_connected(self) -> bool: ...
    def on_connect(self, callback: Callable[[], None]) -> None: ...


class Messenger(Protocol):
    """What sends messages and hears them, by kind and by whom they are about."""

    def subject(self, kind: str, who: str) -> str: ...
    async def send(self, subject: str, payload: bytes = b"") -> None: ...
    async def subscribe(self, subject: str, kind: type[_Message], callback: Callable[[_Message], None]) -> None: ...


@dataclass(slots=True)
class EventCounters:
    """For metrics; they only grow."""

    published: int = 0
    dropped: int = 0
    malformed: int = 0
    connected: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """One message that came in answer. `status`: set when NATS itself answered, e.g. `503` for nobody there."""

    data: bytes
    headers: Mapping[str, str]
    reply: str

    @property
    def status(self) -> str | None:
        return self.headers.get("Status")


class Inbox:
    """A subject of our own, and what is sent to it."""

    def __init__(self, subject: str, subscription: Subscription) -> None:
        self.subject = subject
        self._subscription = subscription

    async def next(self, timeout_s: float) -> Reply:
        """Raises:  EventPlaneUnavailable."""
        with _translated(f"no answer within {timeout_s:.3g} s"):
            # Not its own timeout: that waits with `asyncio.wait_for`, which may swallow a cancellation.
            async with asyncio.timeout(timeout_s):
                message = await self._subscription.next_msg(timeout=None)
        return Reply(message.data, message.headers or {}, message.reply)


class _Part(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of a snapshot's packed hashes, from byte `offset` of `size`."""

    epoch: int
    seq: int
    size: int
    offset: int
    hashes: bytes


class EventPlane:
    """One connection to NATS, and everything of one namespace that goes over it.

    url: `nats://[user:password@]host:port[,nats://host:port…]`, or `tls://`.
    Raises:  ValueError for an unusable url, file or namespace.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        *,
        security: NatsSecurity | None = None,
        name: str = "headrace",
        rng: random.Random | None = None,
    ) -> None:
        self._address = parse_nats(url)
        self._keys = NatsKeys(self._address, security or NatsSecurity())
        self.namespace = check_namespace(namespace)
        self._name = name
        self._rng = rng or random.Random()
        self._encoder = msgspec.msgpack.Encoder()
        self._client: Client | None = None
        self._subscriptions: list[tuple[str, Callable[[Msg], Awaitable[None]]]] = []
        self._on_connect: list[Callable[[], None]] = []
        self._connected = asyncio.Event()
        self._is_outage_logged = False
        self.counters = EventCounters()

    # --- the connection ------------------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set()

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Call this whenever there is a connection: the first time, and after each outage. It must not raise."""
        self._on_connect.append(callback)

    async def run(self) -> None:
        """Stay connected until cancelled."""
        while True:
            closed = asyncio.Event()
            client = Client(self._keys)
            try:
                await self._connect(client, closed)
                await closed.wait()  # nats-py reconnects by itself, but gives up after some errors of the protocol
                _log.warning("nats.closed", reason=str(client.last_error))
            except (nats.errors.Error, OSError) as exc:
                _log.warning("nats.failed", reason=str(exc))
            finally:
                self._client = None
                self._connected.clear()
                await _close(client)
            await asyncio.sleep(self._rng.uniform(0.5, 1.0))

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises:  EventPlaneUnavailable if there is no connection by then."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise EventPlaneUnavailable(
                f"no connection to NATS at {', '.join(self._address.servers)} within {timeout_s} s"
            ) from None

    async def flush(self, timeout_s: float = 2.0) -> None:
        """Return when NATS has seen everything published and subscribed so far.  Raises:  EventPlaneUnavailable.

        nats-py's own flush does not tell: its ping goes out before the commands that wait in its buffer.
        """
        async with self.inbox() as inbox:
            await self.send(inbox.subject)
            await inbox.next(timeout_s)

    async def _connect(self, client: Client, closed: asyncio.Event) -> None:
        async def disconnected() -> None:
            if self._connected.is_set():
                _log.warning("nats.disconnected")
            self._connected.clear()

        async def reconnected() -> None:
            self._now_connected()

        async def gone() -> None:
            closed.set()

        await client.connect(
            servers=list(self._address.servers),
            name=self._name,
            connect_timeout=2,
            max_reconnect_attempts=-1,
            reconnect_time_wait=self._rng.uniform(0.25, 0.75),  # type: ignore[arg-type]  # passed on to sleep
            ping_interval=5,
            max_outstanding_pings=2,
            flush_timeout=2.0,
            error_cb=self._failed,
            disconnected_cb=disconnected,
            reconnected_cb=reconnected,
            closed_cb=gone,
        )
        for subject, handler in self._subscriptions:  # also those that are added meanwhile
            await client.subscribe(subject, cb=handler)
        self._client = client
        self._now_connected()

    def _now_connected(self) -> None:
        _log.info("nats.connected")
        self._is_outage_logged = False
        self.counters.connected += 1
        self._connected.set()
        for callback in self._on_connect:
            callback()

    async def _failed(self, exc: Exception) -> None:
        """nats-py tells every error here: its own, those of attempts to connect, those of our callbacks."""
        if not isinstance(exc, nats.errors.Error | OSError):
            _log.error("events.callback_failed", exc_info=exc)
        elif not self.is_connected and not self._is_outage_logged:
            self._is_outage_logged = True
            _log.warning(
                "nats.unavailable", servers=", ".join(self._address.servers), reason=str(exc) or type(exc).__name__
            )
        else:
            _log.debug("nats.error", reason=str(exc) or type(exc).__name__)

    def _require_client(self) -> Client:
        if self._client is None or not self._client.is_connected:
            raise EventPlaneUnavailable(f"no connection to NATS at {', '.join(self._address.servers)}")
        return self._client

    # --- messages of any kind --------------------------------------------------------------------------------------

    def subject(self, kind: str, who: str) -> str:
        """The subject for messages of this kind about a worker or a model, whatever characters its name has."""
        return f"headrace.{self.namespace}.{kind}.{subject_token(who)}"

    def subjects(self, kind: str) -> str:
        """Every subject for messages of this kind, as a pattern."""
        return f"headrace.{self.namespace}.{kind}.*"

    @property
    def max_message_bytes(self) -> int:
        """What the server takes; NATS's default of 1 MB while there has been none."""
        return self._client.max_payload if self._client is not None else 1024 * 1024

    async def send(self, subject: str, payload: bytes = b"", *, reply: str = "") -> None:
        """Raises:  EventPlaneUnavailable."""
        with _translated(f"message to {subject} not sent"):
            await self._require_client().publish(subject, payload, reply=reply)

    async def request(
        self, subject: str, payload: bytes = b"", *, timeout_s: float, headers: dict[str, str] | None = None
    ) -> Reply:
        """Raises:  EventPlaneUnavailable, at once if nobody listens on that subject."""
        with _translated(f"no answer from {subject} within {timeout_s:.3g} s"):
            message = await self._require_client().request(subject, payload, timeout=timeout_s, headers=headers)
        return Reply(message.data, message.headers or {}, message.reply)

    async def store(
        self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None, timeout_s: float = 5.0
    ) -> None:
        """Publish to a stream; returns when it is stored.  Raises:  JetStreamRefused, EventPlaneUnavailable."""
        _check(subject, await self.request(subject, payload, timeout_s=timeout_s, headers=headers))

    async def jetstream(self, call: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call of JetStream's API, e.g. `STREAM.INFO.name`.  Raises:  JetStreamRefused, EventPlaneUnavailable."""
        payload = json.dumps(body).encode() if body is not None else b""
        return _check(call, await self.request(f"$JS.API.{call}", payload, timeout_s=5.0))

    async def ensure_stream(self, config: Mapping[str, Any]) -> None:
        """Create a stream, or bring it to these settings.  Raises:  JetStreamRefused, EventPlaneUnavailable."""
        try:
            await self.jetstream(f"STREAM.CREATE.{config['name']}", config)
        except JetStreamRefused as exc:
            if exc.err_code != _STREAM_EXISTS:
                raise
            await self.jetstream(f"STREAM.UPDATE.{config['name']}", config)

    @asynccontextmanager
    async def inbox(self, subject: str = "") -> AsyncIterator[Inbox]:
        """What is sent to this subject from now on; by default to a new one of our own, which nobody gets after that.

        Raises:  EventPlaneUnavailable.
        """
        client = self._require_client()
        subject = subject or client.new_inbox()
        with _translated("no inbox"):
            subscription = await client.subscribe(subject)
        try:
            yield Inbox(subject, subscription)
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    # --- KV events and load reports --------------------------------------------------------------------------------

    async def subscribe(self, subject: str, kind: type[_Message], callback: Callable[[_Message], None]) -> None:
        """Call back with every message (msgpack) on a subject. Holds across reconnects."""
        await self._subscribe(subject, self._decoded(kind, callback))

    async def serve(self, subject: str, kind: type[_Message], answer: Callable[[_Message], bytes]) -> None:
        """Answer every request (msgpack) on a subject, at once. Holds across reconnects."""
        decoder = msgspec.msgpack.Decoder(kind)

        async def handle(message: Msg) -> None:
            try:
                asked = decoder.decode(message.data)
            except UNREADABLE:
                self.counters.malformed += 1
                return
            with contextlib.suppress(EventPlaneUnavailable):  # whoever asked finds out
                await self.send(message.reply, answer(asked))

        await self._subscribe(subject, handle)

    async def publish_kv(self, events: KvEvents) -> None:
        """Never raises and hardly ever waits: what cannot be sent is dropped, and the digests tell."""
        await self._publish(self.subject("kv", events.worker), events)

    async def publish_load(self, report: LoadReport) -> None:
        """Never raises and hardly ever waits: what cannot be sent is dropped."""
        await self._publish(self.subject("load", report.worker), report)

    async def publish_news(self, news: GatewayNews) -> None:
        """Never raises and hardly ever waits: what cannot be sent is dropped, and the numbers tell."""
        await self._publish(self.subject("gateway", news.gateway), news)

    async def subscribe_news(self, callback: Callable[[GatewayNews], None]) -> None:
        """Call back with what every gateway tells, ourselves included. Holds across reconnects."""
        await self._subscribe(self.subjects("gateway"), self._decoded(GatewayNews, callback))

    async def subscribe_kv(self, callback: Callable[[KvEvents], None]) -> None:
        """Call back with every publication of every worker, in each worker's order. Holds across reconnects."""
        await self._subscribe(self.subjects("kv"), self._decoded(KvEvents, callback))

    async def subscribe_load(self, callback: Callable[[LoadReport], None]) -> None:
        """Call back with every load report of every worker. Holds across reconnects."""
        await self._subscribe(self.subjects("load"), self._decoded(LoadReport, callback))

    async def _publish(self, subject: str, message: KvEvents | LoadReport | GatewayNews) -> None:
        payload = self._encoder.encode(message)
        client = self._client
        if client is None or not client.is_connected:
            self._count_dropped("not connected")
        elif client.pending_data_size + len(payload) > _MAX_PENDING_BYTES:
            self._count_dropped(f"{client.pending_data_size} bytes wait to be sent, {len(payload)} more are too many")
        else:
            try:
                await client.publish(subject, payload)
                self.counters.published += 1
            except (nats.errors.Error, OSError) as exc:
                self._count_dropped(str(exc))

    def _count_dropped(self, reason: str) -> None:
        self.counters.dropped += 1
        if is_notable(self.counters.dropped):
            _log.warning("events.dropped", total=self.counters.dropped, reason=reason)

    async def _subscribe(self, subject: str, handler: Callable[[Msg], Awaitable[None]]) -> None:
        self._subscriptions.append((subject, handler))
        if self._client is not None:
            with _translated(f"not subscribed to {subject}"):
                await self._client.subscribe(subject, cb=handler)

    def _decoded(self, kind: type[_Message], callback: Callable[[_Message], None]) -> Callable[[Msg], Awaitable[None]]:
        decoder = msgspec.msgpack.Decoder(kind)

        async def handle(message: Msg) -> None:
            try:
                value = decoder.decode(message.data)
            except UNREADABLE as exc:
                self.counters.malformed += 1
                if is_notable(self.counters.malformed):
                    _log.warning("events.malformed", total=self.counters.malformed, reason=str(exc))
            else:
                callback(value)

        return handle

    # --- snapshots -----------------------------------------------------------------------------------------------

    async def serve_snapshots(self, worker: WorkerId, take: Callable[[], Snapshot]) -> None:
        """Answer requests for `worker`'s blocks with what `take` returns then. Holds across reconnects."""

        async def serve(request: Msg) -> None:
            snapshot = take()
            try:
                for part in _split(snapshot, min(_PART_BYTES, self.max_message_bytes // 2)):
                    await self.send(request.reply, self._encoder.encode(part))
                    await self.flush()  # at the server's pace, not into our buffer
            except EventPlaneUnavailable as exc:
                _log.warning("snapshot.not_sent", worker=worker, size=len(snapshot.hashes), reason=str(exc))

        await self._subscribe(self.subject("snapshot", worker), serve)

    async def request_snapshot(self, worker: WorkerId, timeout_s: float = 10.0) -> Snapshot:
        """Every block that `worker` holds.  Raises:  EventPlaneUnavailable, at once if nobody serves it."""
        async with self.inbox() as inbox:
            await self.send(self.subject("snapshot", worker), reply=inbox.subject)
            try:
                async with asyncio.timeout(timeout_s):
                    return await _join(worker, inbox, timeout_s)
            except TimeoutError:
                raise EventPlaneUnavailable(f"no snapshot of {worker} within {timeout_s} s") from None


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """nats-py's errors, and the end of the time, as ours."""
    try:
        yield
    except TimeoutError as exc:
        raise EventPlaneUnavailable(what) from exc
    except nats.errors.NoRespondersError as exc:
        raise NobodyListens(f"{what}: {exc}") from exc
    except (nats.errors.Error, OSError) as exc:
        raise EventPlaneUnavailable(f"{what}: {str(exc) or type(exc).__name__}") from exc


def _check(what: str, reply: Reply) -> dict[str, Any]:
    """JetStream's answer, unless it is an error."""
    answer: dict[str, Any] = json.loads(reply.data)
    if error := answer.get("error"):
        raise JetStreamRefused(what, error.get("err_code", 0), error.get("description", ""))
    return answer


def _split(snapshot: Snapshot, part_bytes: int = _PART_BYTES) -> Iterator[_Part]:
    hashes = snapshot.hashes
    for offset in range(0, max(1, len(hashes)), part_bytes):
        yield _Part(snapshot.epoch, snapshot.seq, len(hashes), offset, hashes[offset : offset + part_bytes])


async def _join(worker: WorkerId, inbox: Inbox, timeout_s: float) -> Snapshot:
    hashes = bytearray()
    which: tuple[int, int, int] | None = None
    while True:
        reply = await inbox.next(timeout_s)
        if reply.status is not None:
            raise EventPlaneUnavailable(f"nobody serves the snapshot of {worker} (status {reply.status})")
        try:
            part = msgspec.msgpack.decode(reply.data, type=_Part)
        except UNREADABLE as exc:
            raise EventPlaneUnavailable(f"snapshot of {worker} is malformed: {exc}") from exc
        which = which or (part.epoch, part.seq, part.size)
        if which != (part.epoch, part.seq, part.size):
            raise EventPlaneUnavailable(f"a part of another snapshot of {worker} came in between")
        if part.offset != len(hashes):
            raise EventPlaneUnavailable(f"snapshot of {worker} goes on at byte {part.offset}, not at {len(hashes)}")
        hashes += part.hashes
        if len(hashes) >= part.size:
            return Snapshot(worker=worker, epoch=part.epoch, seq=part.seq, hashes=bytes(hashes))


async def _close(client: Client) -> None:
    with contextlib.suppress(nats.errors.Error, OSError):  # the end of the time is an OSError, too
        async with asyncio.timeout(2.0):
            await client.close()
