"""The worker's HTTP listener for those who watch it: `GET /metrics`, and `GET /live` for probes; no more than that.

One answer a connection; a head has a few seconds and 8 KiB, and only so many may be at it at once. Where others
reach it `/metrics` is told only to who shows the token; `/live` to anybody.
"""

import asyncio
import contextlib
import hmac
import ssl
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST

from planes.wire.errors import UnusableSetting

_PATIENCE_S = 5.0
_HEAD_BYTES = 8192
_MAX_CONNECTIONS = 64


class MetricsPort:
    """exposition: the text for Prometheus.  tls: None: plain HTTP.

    token: what a scraper must show; None: nobody can.  is_open: nobody must.
    """

    def __init__(
        self,
        exposition: Callable[[], bytes],
        *,
        tls: ssl.SSLContext | None = None,
        token: Callable[[], str] | None = None,
        is_open: bool = False,
    ) -> None:
        self._exposition = exposition
        self._tls = tls
        self._token = token
        self._is_open = is_open
        self._server: asyncio.Server | None = None
        self._num_connections = 0

    async def listen(self, host: str, port: int) -> int:
        """Returns the port.  Raises:  UnusableSetting."""
        try:
            patience = {} if self._tls is None else {"ssl_handshake_timeout": _PATIENCE_S}
            self._server = await asyncio.start_server(
                self._answer, host, port, limit=_HEAD_BYTES, ssl=self._tls, **patience
            )
        except OSError as exc:
            raise UnusableSetting("metrics_port", port, f"{host} cannot listen there: {exc.strerror}") from exc
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            if self._num_connections <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_PATIENCE_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._reply(*head.split(b"\r\n")))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asks so is not answered
        finally:
            self._num_connections -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _reply(self, line: bytes, *fields: bytes) -> bytes:
        words = line.split(b" ")
        method, path = (words[0], words[1].split(b"?")[0]) if len(words) == 3 else (b"", b"")
        if method not in (b"GET", b"HEAD"):
            return _message("405 Method Not Allowed", "text/plain", b"GET is possible\n")
        if path == b"/metrics" and not self._is_shown(fields):
            return _message("401 Unauthorized", "text/plain", self._advice, "www-authenticate: Bearer")
        if path == b"/metrics":
            return _message("200 OK", CONTENT_TYPE_LATEST, self._exposition(), is_head=method == b"HEAD")
        if path == b"/live":
            return _message("200 OK", "application/json", b'{"status":"ok"}', is_head=method == b"HEAD")
        return _message("404 Not Found", "text/plain", b"/metrics and /live are possible\n", is_head=method == b"HEAD")

    @property
    def _advice(self) -> bytes:
        return b"" if self._token is not None else b"to be read from here it needs --metrics-token-file\n"

    def _is_shown(self, fields: tuple[bytes, ...]) -> bool:
        """Whether the token is among the head's fields, or none is asked for."""
        if self._is_open or self._token is None:
            return self._is_open
        named = [(name.strip().lower(), value.strip()) for name, _, value in (each.partition(b":") for each in fields)]
        scheme, _, shown = dict(named).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), self._token().encode())


def _message(status: str, content_type: str, body: bytes, *fields: str, is_head: bool = False) -> bytes:
    told = (f"content-type: {content_type}", f"content-length: {len(body)}", "connection: close", *fields)
    head = "\r\n".join((f"HTTP/1.1 {status}", *told, "", ""))
    return head.encode() + (b"" if is_head else body)
