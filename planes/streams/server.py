"""The worker's end of its streams."""

import asyncio
import socket
from functools import partial
from typing import Protocol

import msgspec
import structlog

from planes.streams.greeting import MIN_NONCE_BYTES, StreamKeys, gateway_proof, is_proof, new_nonce, worker_proof
from planes.streams.peer import Peer
from planes.streams.protocol import FROM_GATEWAY, TOO_DEEP, ProtocolError, StreamLimits, stream_of, tag_of
from planes.wire.floods import is_notable
from planes.wire.frames import (
    Cancel,
    Challenge,
    Delta,
    Done,
    Failed,
    FailureKind,
    FromGateway,
    Generate,
    Hello,
    Introduction,
    Ping,
    Pong,
    Release,
    Step,
    StreamId,
)
from planes.wire.messages import RequestId, WorkerId

_log = structlog.get_logger()

_LAST_WORDS_S = 1.0
"""How long what has been posted at the end may take to be sent."""
_PAUSE_S = 0.1
"""After a connection that could not be taken, as when there are too many files: it waits, and would at once be next."""


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
        self._token = server.keys.token
        self._nonce = new_nonce()
        self.is_connected = False

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

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.is_connected = True
        peer = transport.get_extra_info("peername")
        self._peer_name = f"{peer[0]}:{peer[1]}" if peer else "gateway"
        if self._token is None:
            self._welcome(self._server.hello)
        else:
            self._send(Challenge(self._nonce))

    def connection_lost(self, exc: Exception | None) -> None:
        was_known = self._is_known
        super().connection_lost(exc)
        self._server.connections.discard(self)
        if was_known:
            self._server.handler.gone(self)

    def _welcome(self, hello: Hello) -> None:
        self._server.connections.add(self)
        self._send(hello)
        self._now_known()

    def _introduced(self, introduction: Introduction) -> None:
        """Raises:  ProtocolError for one without the token."""
        token, hello = self._token, self._server.hello
        if self._is_known or token is None:
            return
        nonces = {"of_worker": self._nonce, "of_gateway": introduction.nonce}
        has_proved = is_proof(introduction.proof, gateway_proof(token, **nonces))
        if not has_proved or len(introduction.nonce) < MIN_NONCE_BYTES:
            raise ProtocolError("it has not proved that it knows the fleet's token")
        proof = worker_proof(token, **nonces, worker=hello.worker, epoch=hello.epoch)
        self._welcome(msgspec.structs.replace(hello, proof=proof))

    def end_if_unknown(self) -> None:
        """Let go of a stranger."""
        if not self._is_known and self.is_connected:
            self._transport.abort()

    def _received(self, frames: list[memoryview]) -> None:
        for frame in frames:
            if not self._is_known and tag_of(frame) != "introduction":
                raise ProtocolError(f"its first frame is {tag_of(frame)[:64]!r}: it has not said who it is")
            try:
                message = self._decode(frame)
            except RecursionError as exc:
                raise ProtocolError(TOO_DEEP) from exc
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
            elif type(message) is Introduction:
                self._introduced(message)

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
    """Listens for gateways and hands what they say to `handler`.

    Its tasks are its own, from `listen` to `stop`: one that accepts, and one for each stranger until it is known.
    """

    def __init__(
        self,
        handler: StreamHandler,
        *,
        worker: WorkerId,
        epoch: int,
        limits: StreamLimits | None = None,
        keys: StreamKeys | None = None,
    ) -> None:
        """Args:  keys: None: whoever connects is a gateway."""
        self.handler = handler
        self.hello = Hello(worker, epoch)
        self.limits = limits or StreamLimits()
        self.keys = keys or StreamKeys()
        self.connections: set[GatewayConnection] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._strangers: dict[asyncio.Task[None], None] = {}
        """The longest here first."""
        self._num_refused = 0

    async def listen(self, host: str, port: int) -> int:
        """Start listening; port 0 takes a free one.  Returns: the port.  Raises: OSError if it is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._listener.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(self._listener))
        bound: int = self._listener.getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stop listening and end every connection after what has been posted."""
        if self._listener is None or self._accepting is None:
            return
        ending = [self._accepting, *self._strangers]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._listener.close()
        left = [connection.closed for connection in self.connections]
        for connection in list(self.connections):
            connection.close()
        if left:  # TLS takes a round trip to end
            await asyncio.wait(left, timeout=_LAST_WORDS_S)
        for connection in list(self.connections):
            connection.abort()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connected, _ = await loop.sock_accept(listener)
            except OSError as exc:
                _log.warning("stream.not_accepted", reason=str(exc))
                await asyncio.sleep(_PAUSE_S)
                continue
            # The longest here goes: if the newest did, strangers who wait would keep every gateway out.
            while len(self._strangers) >= self.limits.max_strangers:
                eldest = next(iter(self._strangers))
                del self._strangers[eldest]
                eldest.cancel()
            connection = GatewayConnection(self)
            stranger = loop.create_task(self._greet(connection, connected))
            self._strangers[stranger] = None
            stranger.add_done_callback(partial(self._seen_off, connection, connected))

    def _seen_off(self, connection: GatewayConnection, connected: socket.socket, stranger: asyncio.Task[None]) -> None:
        self._strangers.pop(stranger, None)
        connection.end_if_unknown()
        if not connection.is_connected:  # let go of before it was looked at
            connected.close()

    async def _greet(self, connection: GatewayConnection, connected: socket.socket) -> None:
        """See a connection through until it is known."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limits.greeting_s):
                await loop.connect_accepted_socket(lambda: connection, connected, ssl=self.keys.to_gateway)
                await asyncio.shield(connection.greeted)  # which is not to be cancelled with us
        except TimeoutError:
            self._refused(connection, f"it has not said who it is within {self.limits.greeting_s:g} s")
        except OSError as exc:
            self._refused(connection, str(exc) or type(exc).__name__)

    def _refused(self, connection: GatewayConnection, reason: str) -> None:
        self._num_refused += 1
        if is_notable(self._num_refused):
            _log.warning("stream.refused", peer=connection.peer_name, reason=reason, total=self._num_refused)
