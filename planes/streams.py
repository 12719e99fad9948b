"""Streams: one TCP connection per (gateway process, worker), many requests on it.

A frame is a 4-byte little-endian length and that many bytes of msgpack (`wire/frames.py`). A worker writes one Step
per engine step and gateway, so the cost of a frame is shared by all requests of the step. Both sides send a Ping when
they have heard nothing for a while, and give the other up when several in a row stay unanswered.

    gateway                                    worker
    WorkerConnection.open  ── connect ──────►  StreamServer
                           ◄───────── Hello ──
    start                  ── Generate ─────►  handler.generate
    sink.on_delta …        ◄────────── Step ──  connection.post(Delta)
    sink.on_done           ◄────────── Step ──  connection.post(Done)
    cancel                 ── Cancel ───────►  handler.cancel
    release                ── Release ──────►  handler.release
    sink.on_lost             connection ends    handler.gone

Everything here is called on the event loop and calls back on it; nothing but `open`, `serve` and `stop` waits.
"""

import asyncio
import ssl
from dataclasses import dataclass
from typing import Protocol, cast, get_args

import msgspec
import structlog

from planes.wire.errors import Interrupted, Rejected
from planes.wire.frames import (
    Cancel,
    Delta,
    Done,
    Failed,
    FailureKind,
    FromGateway,
    FromWorker,
    Generate,
    Hello,
    Ping,
    Pong,
    Release,
    Step,
    StreamId,
)
from planes.wire.messages import RequestId, WorkerId

_log = structlog.get_logger()
_encode = msgspec.msgpack.Encoder().encode


class WorkerUnreachable(Rejected):
    """The worker could not be asked; it has seen nothing of the request."""

    code = "worker_unreachable"

    def __init__(self, worker: WorkerId, reason: str) -> None:
        super().__init__(f"worker {worker} cannot be reached: {reason}")
        self.worker = worker


class WorkerLost(Interrupted):
    """The connection ended while the worker had the request."""

    code = "worker_lost"

    def __init__(self, worker: WorkerId, reason: str) -> None:
        super().__init__(f"worker {worker} was lost: {reason}")
        self.worker = worker


class ProtocolError(Exception):
    """The peer sent something that is no frame of ours; the connection ends."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds and heartbeat of one connection.

    ping_s: seconds of silence before a Ping.  dead_s: seconds of silence after which the peer counts as dead.
    max_frame_bytes: longest frame accepted or sent.  max_unsent_bytes: most bytes waiting for a peer that reads slowly.
    """

    ping_s: float = 1.0
    dead_s: float = 3.0
    max_frame_bytes: int = 64 << 20
    max_unsent_bytes: int = 128 << 20

    def __post_init__(self) -> None:
        if not 0 < self.ping_s < self.dead_s:
            raise ValueError(f"ping_s is {self.ping_s} and dead_s {self.dead_s}; 0 < ping_s < dead_s must hold")


class _Tagged(msgspec.Struct):
    """What every frame has, of whatever version."""

    type: str


class _Addressed(msgspec.Struct):
    """What every Generate has, of whatever version."""

    stream: StreamId


_FROM_GATEWAY, _FROM_WORKER = (
    frozenset(kind.__struct_config__.tag for kind in get_args(kinds)) for kinds in (FromGateway, FromWorker)
)
"""Tags of the frames that this version knows."""


class FrameBuffer:
    """Cuts a byte stream into frames. No I/O."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._rest = bytearray()
        self._needed = 4

    def feed(self, data: bytes) -> list[memoryview]:
        """Frames completed by `data`, in order, without their length.  Raises: ProtocolError for a frame too long."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
        view, at, end = memoryview(data), 0, len(data)
        frames = []
        self._needed = 4
        while end - at >= 4:
            size = int.from_bytes(view[at : at + 4], "little")
            if size > self._max_frame_bytes:
                raise ProtocolError(f"the peer announces a frame of {size} bytes; the limit is {self._max_frame_bytes}")
            if end - at - 4 < size:
                self._needed = 4 + size
                break
            frames.append(view[at + 4 : at + 4 + size])
            at += 4 + size
        self._rest = bytearray(view[at:])
        return frames


class _Peer(asyncio.Protocol):
    """What both ends share: framing, heartbeat, the limit on unsent bytes, and the reason for the end."""

    def __init__(self, limits: StreamLimits, tags: frozenset[object]) -> None:
        self._limits = limits
        self._tags = tags
        self._has_passed_over = False
        self._loop = asyncio.get_running_loop()
        self._frames = FrameBuffer(limits.max_frame_bytes)
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._was_heard = True
        self._missed_beats = 0
        self._reason = ""
        self.num_bytes_received = 0
        self.num_bytes_sent = 0

    @property
    def peer_name(self) -> str:
        raise NotImplementedError

    def _received(self, frames: list[memoryview]) -> None:
        """Take the frames that came in one read."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from asyncio's
        self._timer = self._loop.call_later(self._limits.ping_s, self._beat)

    def data_received(self, data: bytes) -> None:
        self._was_heard = True
        self.num_bytes_received += len(data)
        try:
            self._received(self._frames.feed(data))
        except (ProtocolError, msgspec.MsgspecError) as exc:
            self._give_up(f"protocol error: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._reason = self._reason or (str(exc) or type(exc).__name__ if exc else "the peer closed the connection")

    def _pass_over(self, frame: memoryview, exc: msgspec.ValidationError) -> None:
        """Leave alone what only a later version knows.  Raises:  `exc` if this version should have understood it."""
        tag = msgspec.msgpack.decode(frame, type=_Tagged).type
        if tag in self._tags:
            raise exc
        if not self._has_passed_over:
            _log.warning("stream.unknown_frame", peer=self.peer_name, tag=tag[:64])
        self._has_passed_over = True

    def _send(self, message: FromGateway | FromWorker) -> None:
        """Raises:  ProtocolError if the message is longer than a frame may be."""
        self._write(self._framed(message))

    def _framed(self, message: FromGateway | FromWorker) -> bytes:
        """Raises:  ProtocolError if the message is longer than a frame may be."""
        payload = _encode(message)
        if len(payload) > self._limits.max_frame_bytes:
            raise ProtocolError(
                f"{type(message).__name__} takes {len(payload)} bytes; the limit is {self._limits.max_frame_bytes}"
            )
        return len(payload).to_bytes(4, "little") + payload

    def _write(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self.num_bytes_sent += len(data)
        self._transport.write(data)
        unsent = self._transport.get_write_buffer_size()
        if unsent > self._limits.max_unsent_bytes:
            self._give_up(
                f"{unsent} bytes wait for a peer that reads slowly; the limit is {self._limits.max_unsent_bytes}"
            )

    def _beat(self) -> None:
        # Beats are counted, not seconds: after a stall of our own loop, what the peer sent meanwhile counts first.
        self._missed_beats = 0 if self._was_heard else self._missed_beats + 1
        if self._missed_beats * self._limits.ping_s >= self._limits.dead_s:
            self._give_up(f"silent for {self._limits.dead_s} s")
            return
        if not self._was_heard:
            self._send(Ping())
        self._was_heard = False
        self._timer = self._loop.call_later(self._limits.ping_s, self._beat)

    def _give_up(self, reason: str) -> None:
        self._reason = self._reason or reason
        _log.warning("stream.given_up", peer=self.peer_name, reason=reason)
        self._transport.abort()


# --- the gateway's side ----------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Where one request's news go. Called on the event loop, in order; must neither block nor raise.

    Nothing follows `on_done`, `on_failed` or `on_lost`.
    """

    def on_delta(self, payload: bytes, tokens: list[int]) -> None: ...
    def on_done(self, done: Done) -> None: ...
    def on_failed(self, failed: Failed) -> None: ...
    def on_lost(self, error: WorkerLost) -> None: ...


class WorkerConnection(_Peer):
    """The gateway's end of the stream to one worker. Made by `open`; when it ends, a new one is made."""

    def __init__(self, worker: WorkerId, epoch: int, limits: StreamLimits) -> None:
        super().__init__(limits, _FROM_WORKER)
        self.worker = worker
        self._epoch = epoch
        self._decode = msgspec.msgpack.Decoder(FromWorker).decode
        self._sinks: dict[StreamId, Sink] = {}
        self._posted: list[bytes] = []
        self._next_stream = 1
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[str] = self._loop.create_future()
        """Done when the connection has ended; the result is the reason, for the log."""

    @classmethod
    async def open(
        cls,
        worker: WorkerId,
        epoch: int,
        address: str,
        *,
        deadline: float,
        limits: StreamLimits | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> "WorkerConnection":
        """Connect and hear the worker's Hello.

        Args:  address: host:port.  deadline: on the event loop's clock.
        Raises:  WorkerUnreachable, also when another worker or another epoch answers at `address`.
        """
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        connection = cls(worker, epoch, limits or StreamLimits())
        try:
            async with asyncio.timeout_at(deadline):
                await loop.create_connection(lambda: connection, host.strip("[]"), int(port), ssl=tls)
                await connection._greeting()
        except TimeoutError as exc:
            raise WorkerUnreachable(worker, f"no answer from {address} before the deadline") from exc
        except (OSError, ValueError) as exc:
            raise WorkerUnreachable(worker, f"{address}: {exc}") from exc
        return connection

    async def _greeting(self) -> None:
        try:
            await self._ready
        except asyncio.CancelledError:
            self.close()
            raise

    @property
    def peer_name(self) -> str:
        return self.worker

    @property
    def num_streams(self) -> int:
        return len(self._sinks)

    def start(self, request: Generate, sink: Sink) -> StreamId:
        """Send `request` under a stream id of this connection's choosing (`request.stream` is overwritten).

        Raises:  WorkerUnreachable if the connection has ended, or the request does not fit a frame.
        """
        if self._transport.is_closing():
            raise WorkerUnreachable(self.worker, self._reason or "the connection is closing")
        stream = StreamId(self._next_stream)
        self._next_stream += 1
        try:
            self._post(msgspec.structs.replace(request, stream=stream))
        except ProtocolError as exc:
            raise WorkerUnreachable(self.worker, str(exc)) from exc
        self._sinks[stream] = sink
        return stream

    def cancel(self, stream: StreamId) -> None:
        """The sink hears nothing more. Streams that have ended are ignored."""
        if self._sinks.pop(stream, None) is not None:
            self._post(Cancel(stream))

    def release(self, request: RequestId) -> None:
        """The worker need not keep what it has for the decode leg of this request, which has been handed over."""
        self._post(Release(request))

    def _post(self, message: Generate | Cancel | Release) -> None:
        """Send with everything else that is posted in this turn of the event loop: each write is a system call.

        Raises:  ProtocolError if the message is longer than a frame may be.
        """
        self._posted.append(self._framed(message))
        if len(self._posted) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        posted, self._posted = self._posted, []
        if posted:
            self._write(b"".join(posted))

    def close(self) -> None:
        """End the connection after what has been posted; its sinks hear `on_lost`."""
        self._reason = self._reason or "closed by this gateway"
        self._flush()
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(self._reason))
            self._ready.exception()  # `open` may have gone already
        if not self.closed.done():
            self.closed.set_result(self._reason)
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.on_lost(WorkerLost(self.worker, self._reason))

    def _received(self, frames: list[memoryview]) -> None:
        steps = []
        for frame in frames:
            try:
                message = self._decode(frame)
            except msgspec.ValidationError as exc:
                self._pass_over(frame, exc)
                continue
            if type(message) is Step:
                steps.append(message)
            elif type(message) is Ping:
                self._send(Pong())
            elif type(message) is Hello:
                self._greeted(message)
        if steps:
            self._stepped(steps[0] if len(steps) == 1 else _joined(steps))

    def _stepped(self, step: Step) -> None:
        sinks = self._sinks
        for delta in step.deltas:
            sink = sinks.get(delta.stream)
            if sink is not None:
                sink.on_delta(delta.payload, delta.tokens)
        for done in step.done:
            sink = sinks.pop(done.stream, None)
            if sink is not None:
                sink.on_done(done)
        for failed in step.failed:
            sink = sinks.pop(failed.stream, None)
            if sink is not None:
                sink.on_failed(failed)

    def _greeted(self, hello: Hello) -> None:
        if (hello.worker, hello.epoch) != (self.worker, self._epoch):
            self._reason = (
                f"{hello.worker} of epoch {hello.epoch} answers there; wanted {self.worker} of epoch {self._epoch}"
            )
            self._transport.abort()
        elif not self._ready.done():
            self._ready.set_result(None)


def _joined(steps: list[Step]) -> Step:
    """What several steps had, as one: a gateway that lags behind hands each client one piece, not one for each step."""
    deltas: dict[StreamId, list[Delta]] = {}
    for step in steps:
        for delta in step.deltas:
            deltas.setdefault(delta.stream, []).append(delta)
    return Step(
        [run[0] if len(run) == 1 else _joined_deltas(run) for run in deltas.values()],
        [done for step in steps for done in step.done],
        [failed for step in steps for failed in step.failed],
    )


def _joined_deltas(run: list[Delta]) -> Delta:
    tokens = [token for delta in run for token in delta.tokens]
    return Delta(run[0].stream, b"".join([delta.payload for delta in run]), tokens)


# --- the worker's side -----------------------------------------------------------------------------------------------


class StreamHandler(Protocol):
    """What a worker does with what gateways say. Called on the event loop; must neither block nor raise."""

    def generate(self, connection: "GatewayConnection", request: Generate) -> None:
        """Run `request`; answer with `connection.post`, at last with one Done or Failed."""

    def cancel(self, connection: "GatewayConnection", stream: StreamId) -> None:
        """Nobody waits for this stream any more. It may just have ended."""

    def release(self, connection: "GatewayConnection", request: RequestId) -> None:
        """Nobody will fetch what is kept of this request, whichever connection it came on. It may be gone already."""

    def gone(self, connection: "GatewayConnection") -> None:
        """Nobody waits for any stream of this connection any more."""


class GatewayConnection(_Peer):
    """The worker's end of the stream to one gateway process."""

    def __init__(self, server: "StreamServer") -> None:
        super().__init__(server.limits, _FROM_GATEWAY)
        self._server = server
        self._decode = msgspec.msgpack.Decoder(FromGateway).decode
        self._deltas: list[Delta] = []
        self._done: list[Done] = []
        self._failed: list[Failed] = []
        self._has_flush = False
        self._peer_name = "gateway"

    @property
    def peer_name(self) -> str:
        return self._peer_name

    def post(self, item: Delta | Done | Failed) -> None:
        """Send with everything else that is posted in this turn of the event loop, as one Step."""
        if isinstance(item, Delta):
            self._deltas.append(item)
        elif isinstance(item, Done):
            self._done.append(item)
        else:
            self._failed.append(item)
        if not self._has_flush:
            self._has_flush = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """End the connection after what has been posted."""
        self._flush()
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self._peer_name = f"{peer[0]}:{peer[1]}" if peer else "gateway"
        self._server.connections.add(self)
        self._send(self._server.hello)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._server.connections.discard(self)
        self._server.handler.gone(self)

    def _received(self, frames: list[memoryview]) -> None:
        for frame in frames:
            try:
                message = self._decode(frame)
            except msgspec.ValidationError as exc:
                self._refuse(frame, exc)
                continue
            if type(message) is Generate:
                self._server.handler.generate(self, message)
            elif type(message) is Cancel:
                self._server.handler.cancel(self, message.stream)
            elif type(message) is Release:
                self._server.handler.release(self, message.request)
            elif type(message) is Ping:
                self._send(Pong())

    def _refuse(self, frame: memoryview, exc: msgspec.ValidationError) -> None:
        """Answer a request that cannot be read: it may use what a later version can, and the others here do not."""
        if msgspec.msgpack.decode(frame, type=_Tagged).type == "generate":
            stream = msgspec.msgpack.decode(frame, type=_Addressed).stream
            self.post(Failed(stream, FailureKind.REJECTED, "unreadable_request", f"{self._server.hello.worker}: {exc}"))
        else:
            self._pass_over(frame, exc)

    def _flush(self) -> None:
        self._has_flush = False
        if not (self._deltas or self._done or self._failed):
            return
        step = Step(self._deltas, self._done, self._failed)
        self._deltas, self._done, self._failed = [], [], []
        try:
            self._send(step)
        except ProtocolError as exc:
            self._give_up(str(exc))


class StreamServer:
    """Listens for gateways and hands what they say to `handler`."""

    def __init__(
        self,
        handler: StreamHandler,
        *,
        worker: WorkerId,
        epoch: int,
        limits: StreamLimits | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.handler = handler
        self.hello = Hello(worker, epoch)
        self.limits = limits or StreamLimits()
        self.connections: set[GatewayConnection] = set()
        self._tls = tls
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Start listening; port 0 takes a free one.  Returns: the port.  Raises: OSError if it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: GatewayConnection(self), host, port, ssl=self._tls)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stop listening and end every connection after what has been posted."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self.connections):
            connection.close()
        await self._server.wait_closed()
