"""The body of a request: read whole, up to a limit."""

from starlette.requests import Request

from app.openai.errors import BodyTooLarge
from planes.wire.errors import InvalidRequest


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The request's body.

    Raises:  BodyTooLarge, before anything is read where the length was announced.  InvalidRequest if the client went.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise BodyTooLarge(int(announced), max_bytes)
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
        if not message.get("more_body", False):
            return b"".join((*pieces, piece)) if pieces else piece
        pieces.append(piece)
