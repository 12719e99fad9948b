"""HTTP answers that cost next to nothing per token.

uvicorn's protocol parses requests; a `StreamedResponse` writes its answer straight on the transport. Nothing here
waits: no task wakes per token, and what a slow client leaves unread is bounded.

    NEW ── begin ──► BEGUN ── write* ──► BEGUN ── end ──► ENDED
    NEW ── whole ───────────────────────────────────────► ENDED
    any ── client gone, or slower than the limit ──► the task that answers is cancelled
"""

import asyncio
import functools
import re
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum, auto
from http import HTTPStatus
from typing import Protocol

import structlog
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.http.connection import EXTENSION, Client
from app.openai import errors as openai_errors
from app.openai.errors import ErrorResponse

_log = structlog.get_logger()

Headers = Sequence[tuple[str, str]]
"""Lower-case names; values without line breaks, in latin-1."""

_COMMENT = b": keep-alive\n\n"
"""What readers of server-sent events pass over."""
_SILENT = b"\0"
"""In place of a head that waits: nothing has been written since `keep_alive`. Never sent."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_STREAM = b"content-type: text/event-stream\r\ncache-control: no-cache\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n"


class _State(Enum):
    NEW = auto()
    BEGUN = auto()
    ENDED = auto()


_NEW, _BEGUN, _ENDED = _State  # bound once, see CONTRIBUTING.md


class ErrorDialect(Protocol):
    """How clients of one API are told errors; `app/openai/errors.py` is one."""

    def response(self, exc: BaseException) -> ErrorResponse:
        """A whole answer."""

    def sse_event(self, exc: BaseException) -> bytes:
        """The last event of a stream."""


class StreamedResponse:
    """The answer to one request.

    max_unsent_bytes: most bytes that may wait for a client before it is cut off; `on_cut_off` is called then.
    """

    __slots__ = (
        "_client",
        "_cycle",
        "_errors",
        "_flow",
        "_head",
        "_is_chunked",
        "_max_unsent_bytes",
        "_on_cut_off",
        "_state",
        "_transport",
    )

    def __init__(
        self,
        client: Client,
        scope: Scope,
        *,
        max_unsent_bytes: int,
        on_cut_off: Callable[[], None],
        errors: ErrorDialect = openai_errors,
    ) -> None:
        self._client = client
        self._errors = errors
        self._transport, self._flow, self._cycle = client.transport, client.flow, client.cycle
        self._max_unsent_bytes = max_unsent_bytes
        self._on_cut_off = on_cut_off
        self._is_chunked = scope["http_version"] != "1.0"  # HTTP/1.0 knows no chunks: its body ends with the connection
        self._state = _NEW
        self._head = b""
        """Goes out with the first bytes after it: each write may be a system call."""

    @property
    def is_gone(self) -> bool:
        """Nobody reads this answer any more."""
        return self._client.is_gone

    @property
    def is_begun(self) -> bool:
        """It is too late for an error status."""
        return self._state is not _NEW

    @property
    def is_ended(self) -> bool:
        return self._state is _ENDED

    def begin(self, headers: Headers) -> None:
        """The head of a streamed answer; it is sent with what follows.

        Raises:  ValueError, as `_encoded`; nothing has changed then.
        """
        self._require(_NEW)
        fields = b"%b%b%b" % (_STREAM, _encoded(headers), _CHUNKED if self._is_chunked else b"")
        if not self._is_chunked:
            self._cycle.keep_alive = False
        self._head = self._start(200, fields, is_chunked=self._is_chunked)

    def write(self, payload: bytes) -> None:
        """Send one chunk, verbatim. `payload` must not be empty: an empty chunk would end the answer."""
        if self._transport.is_closing():  # the client has gone and its worker goes on for a moment: uvloop would raise
            return
        data = b"%x\r\n%b\r\n" % (len(payload), payload) if self._is_chunked else payload
        if self._head:  # also where silence ends, so that keeping alive costs a token nothing
            data = self._taken_head() + data
        self._transport.write(data)
        if self._flow.write_paused:
            self._check_unsent()

    def end(self, last: bytes = b"") -> None:
        """Send `last` and close a streamed answer; the connection stays open for the next request."""
        self._require(_BEGUN)
        if self._is_chunked:
            chunk = b"%x\r\n%b\r\n" % (len(last), last) if last else b""
            last = chunk + b"0\r\n\r\n"
        self._complete(self._taken_head() + last)

    def keep_alive(self) -> None:
        """Send a comment on a streamed answer, unless anything has been written since the last call."""
        self._require(_BEGUN)
        if self._head:
            self.write(_COMMENT)
        self._head = _SILENT

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer in one piece.  Raises:  ValueError, as `_encoded`; nothing has changed then."""
        self._require(_NEW)
        fields = b"content-length: %d\r\n%b" % (len(body), _encoded(headers))
        head = self._start(status, fields, is_chunked=False)
        self._check_unsent()  # of answers before, on the same connection
        self._complete(head + body)

    def fail(self, exc: Exception, headers: Headers) -> None:
        """Tell the client of an error, in whatever shape there is still room for."""
        if self.is_begun:
            self.end(self._errors.sse_event(exc))
        else:
            refusal = self._errors.response(exc)
            self.whole(refusal.status, [*refusal.headers.items(), *headers], refusal.body)

    def _taken_head(self) -> bytes:
        head, self._head = self._head, b""
        return b"" if head is _SILENT else head

    def _require(self, state: _State) -> None:
        if self._state is not state:
            raise RuntimeError(f"the answer is {self._state.name}, not {state.name}")

    def _start(self, status: int, fields: bytes, *, is_chunked: bool) -> bytes:
        """What uvicorn's `send` does for a head, but for the writing.  fields: each with the end of its line."""
        cycle = self._cycle
        defaults = b"".join([b"%b: %b\r\n" % field for field in cycle.default_headers])
        end = b"" if cycle.keep_alive else b"connection: close\r\n"
        cycle.response_started, cycle.chunked_encoding, cycle.waiting_for_100_continue = True, is_chunked, False
        self._state = _BEGUN
        return b"HTTP/1.1 %d %b\r\n%b%b%b\r\n" % (status, _reason(status), defaults, fields, end)

    def _complete(self, data: bytes) -> None:
        """What uvicorn's `send` does with the last bytes."""
        self._state, self._head = _ENDED, b""
        self._client.watch(None)
        cycle = self._cycle
        if cycle.disconnected or self._transport.is_closing():
            return
        self._transport.write(data)
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()

    def _check_unsent(self) -> None:
        unsent = self._transport.get_write_buffer_size()
        if unsent > self._max_unsent_bytes and not self._transport.is_closing():
            _log.warning("client.cut_off", unsent_bytes=unsent, limit_bytes=self._max_unsent_bytes)
            self._on_cut_off()
            self._transport.abort()


Leave = Callable[[], object]
"""Ends what answers a request, whose client has gone, or whose gateway stops."""

AtOnce = Callable[[Scope, bytes, StreamedResponse], Leave | None]
"""Begins to answer a request whose body is here; None: it takes a task, and nothing has been done.

The answer may have ended by then. Must not raise.
"""


class Streamed:
    """An ASGI application whose answers `produce` writes; `produce` is cancelled when the client goes.

    `produce` must turn its errors into an answer itself. Needs a server that runs `StreamingProtocol`.
    at_once: answers what takes no waiting without a task, and so without most of what is around one.
    """

    def __init__(
        self,
        produce: Callable[[Request, StreamedResponse], Awaitable[None]],
        *,
        max_unsent_bytes: int,
        on_cut_off: Callable[[], None],
        errors: ErrorDialect = openai_errors,
        at_once: AtOnce | None = None,
    ) -> None:
        functools.update_wrapper(self, produce)
        self._errors = errors
        self._produce = produce
        self._max_unsent_bytes = max_unsent_bytes
        self._on_cut_off = on_cut_off
        self._at_once = at_once

    def route(self, path: str) -> Route:
        """It answers GET there, and not HEAD, which Starlette adds: what is streamed has no head without a body."""
        found = Route(path, self)
        found.methods = {"GET"}
        return found

    def begin(self, client: Client, scope: Scope, body: bytes) -> bool:
        """Answer a request whose body is here, without a task.  Returns:  False, and nothing is done: it takes one."""
        if self._at_once is None:
            return False
        response = self._response(client, scope)
        leave = self._at_once(scope, body, response)
        if leave is None:
            return False
        if not response.is_ended:
            client.watch(leave, has_task=False)
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del send  # the answer writes on the transport itself
        # Taken out, because a client knows its request's scope: the body would wait for the garbage collector.
        client: Client | None = scope.get("extensions", {}).pop(EXTENSION, None)
        task = asyncio.current_task()
        if client is None or task is None:
            raise RuntimeError("a streamed answer needs a server that runs StreamingProtocol")
        if client.is_gone:
            return
        leave = task.cancel
        client.watch(leave)
        response = self._response(client, scope)
        try:
            await self._produce(Request(scope, receive), response)
        except asyncio.CancelledError:
            # Gone client or stopping server: `produce` has cleaned up, and this is the root of the request's task.
            task.uncancel()
            client.transport.close()
        finally:
            client.unwatch(leave)

    def _response(self, client: Client, scope: Scope) -> StreamedResponse:
        return StreamedResponse(
            client,
            scope,
            max_unsent_bytes=self._max_unsent_bytes,
            on_cut_off=self._on_cut_off,
            errors=self._errors,
        )


def _encoded(headers: Headers) -> bytes:
    """Their lines.  Raises:  ValueError for a header that would be several, or is not latin-1."""
    if _CONTROL.search("".join([name + value for name, value in headers])):
        name, value = next(field for field in headers if _CONTROL.search("".join(field)))
        raise ValueError(f"the header {name!r} has a control character in it: {value!r}")
    return "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1")


@functools.cache
def _reason(status: int) -> bytes:
    return HTTPStatus(status).phrase.encode()
