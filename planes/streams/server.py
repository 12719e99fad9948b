"""The worker's end of its streams."""

import asyncio
from typing import Protocol

import msgspec

from planes.streams.peer import Peer
from planes.streams.protocol import FROM_GATEWAY, ProtocolError, StreamLimits, stream_of, tag_of
from planes.wire.frames import (
    Cancel,
    Delta,
    Done,
    Failed,
    FailureKind,
    FromGateway,
    Generate,
    Hello,
    Ping,
    Pong,
    Release,
    Step,
    StreamId,
)
from planes.wire.messages import RequestId, WorkerId


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


class GatewayConnection(Peer):
    """The worker's end of the stream to one gateway process."""

    def __init__(self, server: "StreamServer") -> None:
        super().__init__(server.limits, FROM_GATEWAY)
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
        if tag_of(frame) == "generate":
            stream = stream_of(frame)
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
    ) -> None:
        self.handler = handler
        self.hello = Hello(worker, epoch)
        self.limits = limits or StreamLimits()
        self.connections: set[GatewayConnection] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Start listening; port 0 takes a free one.  Returns: the port.  Raises: OSError if it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: GatewayConnection(self), host, port)
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
