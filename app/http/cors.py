"""Cross-origin requests (Fetch standard, section 3.3): pages of the origins that `--cors-origin` names may ask.

A browser asks first, with OPTIONS and without the key, whether it may send what a page wants, and shows the page an
answer only if its head names the page's origin. Keys travel in headers of their own, so cookies are never allowed.
"""

from collections.abc import Iterable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.connection import EXTENSION, Client
from app.http.origins import ANY

_METHODS: Final = b"GET, HEAD, POST, DELETE"
_MAX_AGE_S: Final = b"86400"

Field = tuple[bytes, bytes]

_SHOWN: Final[Field] = (b"access-control-expose-headers", b"*")


def cross_origin(app: ASGIApp, origins: Iterable[str]) -> ASGIApp:
    """`app` for pages of these origins too; as it is if there are none."""
    allowed = {origin.encode() for origin in origins}
    if not allowed:
        return app
    is_any = ANY.encode() in allowed
    always: list[Field] = [] if is_any else [(b"vary", b"origin")]  # for caches: the answer to another page differs

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        asked = dict(scope["headers"])
        origin: bytes | None = asked.get(b"origin")
        told = always
        if origin is not None and (is_any or origin in allowed):
            told = [*always, (b"access-control-allow-origin", ANY.encode() if is_any else origin), _SHOWN]
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in asked:
                wanted = asked.get(b"access-control-request-headers")
                headers = [*told, (b"access-control-allow-methods", _METHODS), (b"access-control-max-age", _MAX_AGE_S)]
                headers += [(b"access-control-allow-headers", wanted)] if wanted else []
                await send({"type": "http.response.start", "status": 204, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return
        client: Client | None = scope.get("extensions", {}).get(EXTENSION)
        if client is not None:  # whoever writes the answer's head, it begins with these
            client.cycle.default_headers = [*client.cycle.default_headers, *told]
        await app(scope, receive, send)

    return serve
