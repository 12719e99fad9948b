"""The HTTP connection: uvicorn's protocol, with a limit on all that a client can make us keep or wait for.

Nothing here knows who is asking: keys are looked up once a head is complete. So until then, and until the body is, a
client gets what `ConnectionLimits` says and no more. httptools keeps a header field until it is complete, and so do we
with a request until its answer; what we count is bytes that it took without giving anything back:

| a request's …                                         | is answered                         |
|--------------------------------------------------------|-------------------------------------|
| head, trailers or chunk framing beyond `head_bytes`    | 431                                 |
| head of more than `num_fields`                         | 431                                 |
| last byte more than `read_timeout_s` after its first   | 408                                 |
| predecessors without an answer are `num_pipelined`     | 429                                 |
| head without exactly one Host, or no HTTP/1 at all     | 400                                 |
| body not here yet when the gateway stops               | 503                                 |
| connection is one more than `num_connections`          | 503, before it has said anything    |
| wish for another protocol (`Upgrade`, h2c for one)     | as if it had not been made (RFC 9110, 7.8) |

A refusal waits for the answers to earlier requests and is the connection's last word: what still comes is thrown away
until the client closes too, or for `_LINGER_S`; closing at once would take the answer from a client that still sends.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, cast

import httptools
import structlog
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.http.errors import HeadTooLarge, NotHttp, ReadTimeout, Stopping, TooManyConnections, TooManyPipelined
from app.http.waiting import LateEvent, ShortQueue
from app.openai import errors
from planes.wire.errors import HeadraceError, InvalidRequest

_log = structlog.get_logger()

EXTENSION: Final = "headrace.client"
"""The ASGI extension under which a request's `Client` is found."""

_LINGER_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may cost before its request is admitted."""

    head_bytes: int = 65_536
    """Request line and fields. nginx allows 32 KiB, Go 1 MiB, h11 16 KiB a field."""
    num_fields: int = 128
    """Apache allows 100."""
    num_pipelined: int = 16
    """Requests sent ahead of the answer to an earlier one, which are parsed as they come."""
    read_timeout_s: float = 60.0
    num_connections: int = 32_768
    """All connections of this process together, those that are being refused too; each costs some 10 KB."""


BeginAtOnce = Callable[["Client", Scope, bytes], bool]
"""Begins to answer a request with this body without a task; False: it takes one, and nothing has been done."""

_ANSWERED: Final[dict[str, Any]] = {}
"""In place of the scope of a request that is being answered without a task."""

NOTHING_AT_ONCE: Final[Mapping[str, BeginAtOnce]] = MappingProxyType({})


class Client:
    """The connection that one request came over, as long as its answer lasts."""

    __slots__ = ("_protocol", "cycle", "flow", "transport")

    def __init__(self, protocol: "StreamingProtocol", cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self.cycle = cycle
        self.transport = protocol.transport
        self.flow = protocol.flow

    @property
    def is_gone(self) -> bool:
        return self._protocol.is_gone

    def watch(self, on_gone: Callable[[], object] | None, *, has_task: bool = True) -> None:
        """Call `on_gone` as soon as the connection is lost; None: no longer.

        has_task: a task answers; else `on_gone` is called when the gateway ends, too.
        """
        self._protocol.on_gone, self._protocol.has_task = on_gone, has_task

    def unwatch(self, on_gone: Callable[[], object]) -> None:
        """Call this no longer; what the next request on the connection is watched with stays."""
        if self._protocol.on_gone is on_gone:
            self._protocol.on_gone = None


class StreamingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1 protocol, which hands its connection to our answers. Set as `uvicorn.Config(http=…)`."""

    # With more than 30 attributes in all, a dictionary of its own would take a kilobyte of every connection.
    __slots__ = (
        "_at_once",
        "_deadline",
        "_has_head",
        "_held",
        "_is_reading_head",
        "_is_receiving",
        "_is_refused",
        "_is_upgrade",
        "_limits",
        "_num_hosts",
        "_num_kept",
        "_on_refused",
        "_refusal",
        "has_task",
        "is_gone",
        "on_gone",
    )

    def __init__(
        self,
        *args: Any,
        limits: ConnectionLimits,
        on_refused: Callable[[str], object],
        at_once: Mapping[str, BeginAtOnce] = NOTHING_AT_ONCE,
        **kwargs: Any,
    ) -> None:
        """Args:  on_refused: told the code of each refusal.  at_once: POST routes that may need no task, by path."""
        super().__init__(*args, **kwargs)
        self.pipeline = ShortQueue()  # type: ignore[assignment] # has all that is asked of it
        self.on_gone: Callable[[], object] | None = None
        self.is_gone = False
        self.has_task = True
        """Whether a task answers the latest request."""
        self._limits = limits
        self._on_refused = on_refused
        self._num_kept = 0
        """Bytes that the parser has taken without giving anything back."""
        self._num_hosts = 0
        self._is_receiving = False
        """A request has begun to come and is not complete."""
        self._has_head = False
        self._is_upgrade = False
        """The head under way asks for another protocol: it is read again without that wish."""
        self._deadline: asyncio.TimerHandle | None = None
        self._at_once = at_once
        self._is_reading_head = False
        self._held: tuple[RequestResponseCycle, Any] | None = None
        """A request that may be answered without a task, if all of it comes with its head."""
        self._is_refused = False
        self._refusal: HeadraceError | None = None
        """What is still to be said when earlier answers have ended."""

    # What the transport tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        self.server = _shared(self.server)
        self.flow._is_writable_event = LateEvent(is_set=True)  # type: ignore[assignment] # noqa: SLF001 - uvicorn is pinned
        # The first request has as much time to begin as every other.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        if len(self.connections) > self._limits.num_connections:
            self._refuse(TooManyConnections(self._limits.num_connections))

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.parser is None:
            self._new_parser()
        while data and not self._is_refused:
            room = self._limits.head_bytes - self._num_kept
            piece, data = (data, b"") if len(data) <= room else (data[:room], data[room:])
            data = self._fed(piece) + data
            if self._num_kept >= self._limits.head_bytes:
                self._refuse(HeadTooLarge(self._limits.head_bytes, "bytes"))
        if self._held is not None:
            self._begin_held()
        if (self._is_receiving or self._num_kept) and self._deadline is None and not self._is_refused:
            self._deadline = self.loop.call_later(self._limits.read_timeout_s, self._read_too_long)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_deadline()
        self._tell_gone()

    def shutdown(self) -> None:
        """The server stops: answers under way may end, requests that are not here yet may not."""
        if self._is_receiving and self._has_head and not self._is_refused:
            self._refuse(Stopping())
        if not self._is_refused:
            super().shutdown()
        elif self._refusal is None:
            self.transport.close()

    # What the parser tells

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self._limits.num_pipelined:
            raise TooManyPipelined(self._limits.num_pipelined)
        super().on_message_begin()
        self._is_receiving, self._has_head, self._num_hosts = True, False, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """As uvicorn's, which would count nothing and take trailers for fields of the head."""
        if self._has_head:
            return
        if len(self.headers) >= self._limits.num_fields:
            raise HeadTooLarge(self._limits.num_fields, "fields")
        name = name.lower()
        if name == b"host":
            self._num_hosts += 1
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._num_kept = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise InvalidRequest("CONNECT: this is no proxy.", code="method_not_allowed")
            self._is_upgrade = True
            return
        if self._num_hosts != 1 and (self._num_hosts or self.parser.get_http_version() == "1.1"):
            raise NotHttp(f"it has {self._num_hosts or 'no'} Host fields and must have one")
        self._has_head = True
        self._is_reading_head = True
        super().on_headers_complete()
        self._is_reading_head = False
        self.cycle.message_event = LateEvent()  # type: ignore[assignment] # nobody has waited for the other
        if self._held is None or self._held[0] is not self.cycle:
            # The task that runs the request exists, but has not begun: it will find the extension.
            self.scope["extensions"] = {EXTENSION: Client(self, self.cycle)}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        self._num_kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_kept = 0
        if self._is_upgrade:
            return
        self._is_receiving = False
        self._stop_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._refusal is not None:
            self._say(self._refusal)

    # Answering

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """As uvicorn's; a request that may do without waits for what else has been read with its head."""
        if self._is_reading_head and cycle.scope["path"] in self._at_once and cycle.scope["method"] == "POST":
            self._held = cycle, app
        else:
            super()._start_asgi_task(cycle, app)

    def _begin_held(self) -> None:
        (cycle, app), self._held = self._held, None  # type: ignore[misc] # there is one
        is_whole = not (cycle.more_body or cycle.waiting_for_100_continue or self.is_gone)
        client, scope = Client(self, cycle), cast("Scope", cycle.scope)
        if is_whole and self._at_once[cycle.scope["path"]](client, scope, bytes(cycle.body)):
            # The answer may take minutes, and what was asked is parsed.
            if self.scope is cycle.scope:  # the next request has not begun to come
                self.scope, self.headers = cast("Any", _ANSWERED), []
                if cycle.keep_alive and not self._num_kept:  # the parser would refuse what follows a connection's last
                    self.parser = None
            cycle.scope, cycle.body = cast("Any", _ANSWERED), bytearray()
        else:
            cycle.scope["extensions"] = {EXTENSION: client}  # type: ignore[dict-item]
            super()._start_asgi_task(cycle, app)

    def cut_off(self) -> None:
        """The gateway ends: what answers without a task tells its client now."""
        if self.on_gone is not None and not self.has_task:
            self.on_gone()
            self.transport.close()

    # Limits

    def _fed(self, data: bytes) -> bytes:
        """Let the parser take `data`.  Returns: what it has left, after a head that asked for another protocol."""
        self._num_kept += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._read_again_without_upgrade()
            return data[exc.args[0] :]
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            self._refuse(cause if isinstance(cause, HeadraceError) else NotHttp(str(cause or exc)))
        return b""

    def _read_again_without_upgrade(self) -> None:
        """httptools takes such a head for the whole request, body or not; a parser without the wish goes on with it."""
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        head = b"".join([b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version), *fields, b"\r\n"])
        self._is_upgrade = False
        self._new_parser()
        self._fed(head)

    def _new_parser(self) -> None:
        """As uvicorn's."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _read_too_long(self) -> None:
        self._deadline = None
        if self.pipeline or (not self._has_head and self._has_answer_under_way):
            # The client may be waiting for us, and that answer has a deadline of its own.
            self._deadline = self.loop.call_later(self._limits.read_timeout_s, self._read_too_long)
        else:
            self._refuse(ReadTimeout(self._limits.read_timeout_s, "body" if self._has_head else "head"))

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    @property
    def _has_answer_under_way(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # Refusing

    def _refuse(self, exc: HeadraceError) -> None:
        """End the connection with `exc` as the answer to the request that is coming."""
        self._is_refused = True
        self._stop_deadline()
        self._on_refused(exc.code)
        _log.info("connection.refused", code=exc.code)
        is_halfway = self._is_receiving and self._has_head
        if is_halfway and self.pipeline:
            self.pipeline.popleft()  # the latest
            self._refusal = exc
        elif is_halfway:
            is_answered = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._tell_gone()
            if is_answered:
                self.transport.close()
            else:
                self._say(exc)
        elif self._has_answer_under_way:
            self._refusal = exc
        else:
            self._say(exc)

    def _say(self, exc: HeadraceError) -> None:
        """Write the last answer of this connection, and let the client close it."""
        self._refusal = None
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        answer = errors.response(exc)
        fields = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        fields += [(b"content-length", b"%d" % len(answer.body)), (b"connection", b"close")]
        head = [b"%b: %b\r\n" % field for field in (*self.server_state.default_headers, *fields)]
        self.transport.write(b"".join([STATUS_LINE[answer.status], *head, b"\r\n", answer.body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.close)

    def _tell_gone(self) -> None:
        """Whoever answers is told once, and forgotten: it knows this connection, and what was asked over it."""
        self.is_gone = True
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None:
            on_gone()


@lru_cache(maxsize=64)
def _shared(address: tuple[str, int | None] | None) -> tuple[str, int | None] | None:
    """The first one that was equal: every connection to a listener comes with an address of its own, of 200 bytes."""
    return address
