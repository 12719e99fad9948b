"""The body of a request: read whole, up to a limit of its own and one for all bodies in memory together."""

from types import TracebackType
from typing import Final, Self

from starlette.requests import Request

from app.openai.errors import BodyTooLarge, UnsupportedEncoding
from planes.wire.errors import InvalidRequest, Rejected

_UNCOUNTED_BYTES: Final = 65_536
"""Of each body. A connection's own buffer is as large, and so a flood of large bodies never costs a small one."""
_BYTES_PER_TOKEN: Final = 64
"""Of JSON, generously: an English token takes 4 or 5, one of escaped Chinese 6 to 12, a token id at most 12."""
_OVERHEAD_BYTES: Final = 1 << 20
"""For what is in a body and not in its prompt: field names, reasoning and calls that templates leave out."""


class BodiesFull(Rejected):
    """Other requests' bodies take all the memory that there is for bodies."""

    code = "bodies_full"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The bodies of the requests that are being read take {limit} bytes, which is the limit for all together; "
            "try again in a moment.",
            retry_after_s=1.0,
        )


class BodyMemory:
    """What the bodies of all requests may take at once, from their first byte until their prompts are tokens."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def lease(self) -> "BodyLease":
        """One body's part. It is given back at the end of a `with` block."""
        return BodyLease(self)

    def take(self, num_bytes: int) -> None:
        """Raises:  BodiesFull."""
        if self.num_bytes + num_bytes > self._max_bytes:
            raise BodiesFull(self._max_bytes)
        self.num_bytes += num_bytes


class BodyLease:
    """Memory for one body: as much as has come, whatever its client has announced."""

    __slots__ = ("_memory", "_num_bytes")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def grow_to(self, num_bytes: int) -> None:
        """The body has `num_bytes` so far.  Raises:  BodiesFull."""
        counted = num_bytes - _UNCOUNTED_BYTES
        if counted > self._num_bytes:
            self._memory.take(counted - self._num_bytes)
            self._num_bytes = counted

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.num_bytes -= self._num_bytes


def useful_bytes(context_length: int) -> int:
    """The longest body that makes sense for a model: `1 MiB + 64 bytes x context_length`."""
    return _OVERHEAD_BYTES + _BYTES_PER_TOKEN * context_length


async def read_body(request: Request, max_bytes: int, lease: BodyLease | None = None) -> bytes:
    """The request's body.

    How long it may take is the connection's affair (`ConnectionLimits.read_timeout_s`).
    Raises:  BodyTooLarge, before anything is read where the length was announced; UnsupportedEncoding; BodiesFull.
    InvalidRequest if the client went.
    """
    _check_head(request, max_bytes)
    pieces: list[bytes] = []
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest(f"the connection ended after {num_bytes} bytes of the body")
        piece: bytes = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise BodyTooLarge(num_bytes, max_bytes)
        if lease is not None:
            lease.grow_to(num_bytes)
        if not message.get("more_body", False):
            return b"".join((*pieces, piece)) if pieces else piece
        pieces.append(piece)


def _check_head(request: Request, max_bytes: int) -> None:
    for name, value in request.scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > max_bytes:
            raise BodyTooLarge(int(value), max_bytes)
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise UnsupportedEncoding(value.decode("latin-1"))
