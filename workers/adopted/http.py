"""HTTP/1.1 to one server, a connection for each request: closing it is how `vllm serve` is told that nobody waits."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from planes.wire.errors import HeadraceError, UnusableSetting

_READ_BYTES = 1 << 16


class ServerGone(HeadraceError):  # noqa: N818 - names what is wrong
    """Nobody answers there, or the answer broke off."""

    code = "server_gone"


@dataclass(frozen=True, slots=True)
class Address:
    """Of a server. path: what its routes begin with, without a slash at the end."""

    host: str
    port: int
    path: str = ""
    is_tls: bool = False

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(url: str) -> Address:
    """Raises:  UnusableSetting."""
    allowed = "it must be the URL of a vLLM server, such as http://10.0.0.7:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise UnusableSetting("server", url, f"{allowed} ({exc})") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise UnusableSetting("server", url, allowed)
    is_tls = parts.scheme == "https"
    return Address(parts.hostname, port or (443 if is_tls else 80), parts.path.rstrip("/"), is_tls)


class _Parsed:
    """What httptools has found of a response so far."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.has_head = False
        self.is_complete = False
        self._chunks: list[bytes] = []

    def on_headers_complete(self) -> None:
        self.has_head = True

    def on_body(self, chunk: bytes) -> None:
        self._chunks.append(chunk)

    def on_message_complete(self) -> None:
        self.is_complete = True

    def taken(self) -> bytes:
        """The body's bytes since the last call."""
        chunks, self._chunks = self._chunks, []
        return b"".join(chunks)


class Response:
    """One answer, whose body comes as it is read."""

    def __init__(self, parsed: _Parsed, reader: asyncio.StreamReader) -> None:
        self._parsed = parsed
        self._reader = reader

    @property
    def status(self) -> int:
        return int(self._parsed.parser.get_status_code())

    async def body(self) -> AsyncIterator[bytes]:
        """Raises:  ServerGone if it breaks off."""
        while True:
            if chunk := self._parsed.taken():
                yield chunk
            if self._parsed.is_complete:
                return
            await _fed(self._parsed, self._reader)

    async def read(self) -> bytes:
        """All of it.  Raises:  ServerGone."""
        return b"".join([chunk async for chunk in self.body()])


async def _fed(parsed: _Parsed, reader: asyncio.StreamReader) -> None:
    try:
        data = await reader.read(_READ_BYTES)
        if data:
            parsed.parser.feed_data(data)
    except (OSError, httptools.HttpParserError) as exc:
        raise ServerGone(f"the answer broke off: {type(exc).__name__}: {exc}") from exc
    if not data:
        raise ServerGone("the connection was closed before the answer had ended")


class HttpClient:
    """Asks one server."""

    def __init__(self, address: Address, *, key: str = "") -> None:
        """key: sent as a bearer token; "": none."""
        self.address = address
        self._tls = ssl.create_default_context() if address.is_tls else None
        self._headers = f"Host: {address.netloc}\r\nConnection: close\r\n"
        if key:
            self._headers += f"Authorization: Bearer {key}\r\n"

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        """The connection lasts as long as the block.  Raises:  ServerGone."""
        address = self.address
        try:
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=self._tls)
        except OSError as exc:
            raise ServerGone(f"nobody answers at {address.netloc}: {exc.strerror or exc}") from exc
        try:
            head = f"{method} {address.path}{path} HTTP/1.1\r\n{self._headers}"
            if body:
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}\r\n".encode() + body)
            parsed = _Parsed()
            while not parsed.has_head:
                await _fed(parsed, reader)
            yield Response(parsed, reader)
        finally:
            writer.close()

    async def ask(self, method: str, path: str, body: bytes = b"", *, timeout_s: float) -> tuple[int, bytes]:
        """Status and body.  Raises:  ServerGone, also when the time is over."""
        try:
            async with asyncio.timeout(timeout_s), self.request(method, path, body) as response:
                return response.status, await response.read()
        except TimeoutError:
            raise ServerGone(f"{path} of {self.address.netloc} gave no answer within {timeout_s:g} s") from None
