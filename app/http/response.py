"""HTTP answers that cost next to nothing per token.

uvicorn's protocol parses requests and writes heads and ends as ever; between the two, `Answer.write` puts finished
chunks straight on the transport. No task wakes per token, and a gone client ends the answer at once:

    waiting ── begin ──► begun ── write* ──► begun ── end ──► ended
    waiting ── send_whole ───────────────────────────────────► ended
    any state ── client gone, or slower than the limit ──► the answer's task is cancelled

A payload written while the answer still waits is held back until `begin`, which knows the headers.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence

import structlog
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app.http.connection import EXTENSION, Client

_log = structlog.get_logger()

Headers = Sequence[tuple[str, str]]

_STREAM = (("content-type", "text/event-stream"), ("cache-control", "no-cache"))


class Answer:
    """The answer to one request. Everything but `write` may wait for the client to read."""

    def __init__(
        self, client: Client, scope: Scope, send: Send, *, max_unsent_bytes: int, on_cut_off: Callable[[], None]
    ) -> None:
        self._client = client
        self._transport, self._flow = client.transport, client.flow
        self._send = send
        self._max_unsent_bytes = max_unsent_bytes
        self._on_cut_off = on_cut_off
        self._has_body = scope["method"] != "HEAD"
        self._is_chunked = scope["http_version"] != "1.0"
        self._is_plain = self._has_body and self._is_chunked
        self._held: list[bytes] = []
        self.is_begun = False
        """The head has been sent: it is too late for an error status."""

    @property
    def is_gone(self) -> bool:
        """Nobody reads this answer any more."""
        return self._client.is_gone

    @property
    def has_news(self) -> bool:
        """Something has been written, so `begin` is due or done."""
        return self.is_begun or bool(self._held)

    def write(self, payload: bytes) -> None:
        """Send one chunk, verbatim. `payload` must not be empty (an empty chunk would end the answer)."""
        if not self.is_begun:
            self._held.append(payload)
            return
        if self._is_chunked:
            self._transport.write(_chunk(payload))
        elif self._has_body:
            self._transport.write(payload)
        if self._flow.write_paused:
            self._check_unsent()

    async def begin(self, headers: Headers) -> None:
        """Send the head of a streamed answer and what has been held back.  Raises:  RuntimeError, as `_head`."""
        if self._is_plain and not self._flow.write_paused:
            self._write_out(self._head(headers))
            return
        if not self._is_plain:
            # HTTP/1.0 knows no chunks: its body ends with the connection. This keeps uvicorn from announcing them.
            self._client.cycle.chunked_encoding = self._is_chunked = False
        await self._send({"type": "http.response.start", "status": 200, "headers": _encoded([*_STREAM, *headers])})
        self.is_begun = True
        held, self._held = self._held, []
        for payload in held:
            self.write(payload)

    async def end(self, last: bytes = b"", headers: Headers = ()) -> None:
        """Send `last` and close a streamed answer; the connection stays open for the next request.

        headers: of an answer that has not begun. All that is still to be said is one write, for each is a system call.
        Raises:  RuntimeError, as `_head`.
        """
        if self._is_plain and not self._flow.write_paused:
            head = b"" if self.is_begun else self._head(headers)
            self._write_out(b"%b%b0\r\n\r\n" % (head, _chunk(last) if last else b""))
            self._complete()
            return
        if not self.is_begun:
            await self.begin(headers)
        if last:
            self.write(last)
        await self._send({"type": "http.response.body", "body": b""})

    def _head(self, headers: Headers) -> bytes:
        """What uvicorn's `send` writes for a head, and what has been held back.

        Raises:  RuntimeError for a header that would be several.
        """
        cycle = self._client.cycle
        fields = [*cycle.default_headers, *_encoded([*_STREAM, *headers]), (b"transfer-encoding", b"chunked")]
        if not cycle.keep_alive:
            fields.append((b"connection", b"close"))
        lines = b"\r\n".join([name + b": " + value for name, value in fields])
        if lines.count(b"\n") != len(fields) - 1 or lines.count(b"\r") != len(fields) - 1:
            raise RuntimeError(f"a header has a line break in it: {headers}")
        cycle.response_started, cycle.chunked_encoding, cycle.waiting_for_100_continue = True, True, False
        self.is_begun = True
        held, self._held = self._held, []
        return b"".join([b"HTTP/1.1 200 OK\r\n", lines, b"\r\n\r\n", *map(_chunk, held)])

    def _write_out(self, data: bytes) -> None:
        if not self._client.cycle.disconnected:
            self._transport.write(data)

    def _complete(self) -> None:
        """What uvicorn's `send` does after the last byte."""
        cycle = self._client.cycle
        if cycle.disconnected:
            return
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer in one piece; what has been held back is dropped."""
        self.is_begun = True
        head = [("content-length", str(len(body))), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": _encoded(head)})
        await self._send({"type": "http.response.body", "body": body})

    def abort(self) -> None:
        """Drop the connection: the client reads too slowly to be told anything."""
        self._transport.abort()

    def _check_unsent(self) -> None:
        unsent = self._transport.get_write_buffer_size()
        if unsent > self._max_unsent_bytes and not self._transport.is_closing():
            _log.warning("client.cut_off", unsent_bytes=unsent, limit_bytes=self._max_unsent_bytes)
            self._on_cut_off()
            self._transport.abort()


class Streamed:
    """An ASGI application whose answers `produce` writes; `produce` is cancelled when the client goes.

    `produce` must turn its errors into an answer itself. Needs a server that runs `StreamingProtocol`.
    """

    def __init__(
        self,
        produce: Callable[[Request, Answer], Awaitable[None]],
        *,
        max_unsent_bytes: int,
        on_cut_off: Callable[[], None],
    ) -> None:
        functools.update_wrapper(self, produce)
        self._produce = produce
        self._max_unsent_bytes = max_unsent_bytes
        self._on_cut_off = on_cut_off

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client: Client | None = scope.get("extensions", {}).get(EXTENSION)
        task = asyncio.current_task()
        if client is None or task is None:
            raise RuntimeError("a Streamed answer needs a server that runs StreamingProtocol")
        if client.is_gone:
            return
        client.watch(task.cancel)
        answer = Answer(client, scope, send, max_unsent_bytes=self._max_unsent_bytes, on_cut_off=self._on_cut_off)
        try:
            await self._produce(Request(scope, receive), answer)
        except asyncio.CancelledError:
            # Gone client or stopping server: `produce` has cleaned up, and this is the root of the request's task.
            task.uncancel()
            client.transport.close()
        finally:
            client.watch(None)


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
