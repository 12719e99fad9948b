"""What both ends of a stream share: the bytes of the socket, the timer of the heartbeat, the limits.

Until the other end has said who it is (`greeting.py`) it is a stranger: it may send MAX_GREETING_BYTES, and no heart
beats, since nothing it sends shall be answered. Its time is limited by who waits for the greeting.
"""

import asyncio
from typing import cast

import msgspec
import structlog

from planes.streams.greeting import MAX_GREETING_BYTES
from planes.streams.protocol import Beat, FrameBuffer, Heartbeat, ProtocolError, StreamLimits, framed, tag_of
from planes.wire.frames import FromGateway, FromWorker, Ping

_log = structlog.get_logger()


class Peer(asyncio.Protocol):
    """One end of a connection. `tags`: of the frames that the other end may send, as far as this version knows."""

    def __init__(self, limits: StreamLimits, tags: frozenset[object]) -> None:
        self._limits = limits
        self._tags = tags
        self._has_passed_over = False
        self._loop = asyncio.get_running_loop()
        self._frames = FrameBuffer(MAX_GREETING_BYTES)
        self._is_known = False
        self.greeted: asyncio.Future[None] = self._loop.create_future()
        """Done when the other end is known; fails with ConnectionError if it ends before."""
        self._heartbeat = Heartbeat(limits)
        self.closed: asyncio.Future[str] = self._loop.create_future()
        """Done when the connection has ended; the result is the reason, for the log."""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
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

    def _now_known(self) -> None:
        self._is_known = True
        if not self.greeted.done():
            self.greeted.set_result(None)
        self._frames.max_frame_bytes = self._limits.max_frame_bytes
        self._timer = self._loop.call_later(self._limits.ping_s, self._beat)

    def data_received(self, data: bytes) -> None:
        self._heartbeat.was_heard = True
        self.num_bytes_received += len(data)
        if not self._is_known and self.num_bytes_received > MAX_GREETING_BYTES:
            self._give_up(f"it sent more than {MAX_GREETING_BYTES} bytes and has not said who it is")
            return
        try:
            self._received(self._frames.feed(data))
        except (ProtocolError, msgspec.MsgspecError) as exc:
            self._give_up(f"protocol error: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._reason = self._reason or (str(exc) or type(exc).__name__ if exc else "the peer closed the connection")
        if not self.closed.done():
            self.closed.set_result(self._reason)
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionError(self._reason))
            self.greeted.exception()  # whoever waits may have gone already

    def _pass_over(self, frame: memoryview, exc: msgspec.ValidationError) -> None:
        """Leave alone what only a later version knows.  Raises:  `exc` if this version should have understood it."""
        tag = tag_of(frame)
        if tag in self._tags:
            raise exc
        if not self._has_passed_over:
            _log.warning("stream.unknown_frame", peer=self.peer_name, tag=tag[:64])
        self._has_passed_over = True

    def _send(self, message: FromGateway | FromWorker) -> None:
        """Raises:  ProtocolError if the message is longer than a frame may be."""
        self._write(framed(message, self._limits.max_frame_bytes))

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
        beat = self._heartbeat.beat()
        if beat is Beat.GIVE_UP:
            self._give_up(f"silent for {self._limits.dead_s} s")
            return
        if beat is Beat.PING:
            self._send(Ping())
        self._timer = self._loop.call_later(self._limits.ping_s, self._beat)

    def _give_up(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self._is_known:  # of strangers there may be many: their end is told by who waits for the greeting
            _log.warning("stream.given_up", peer=self.peer_name, reason=reason)
        self._transport.abort()
