"""The console's routes: its page is open and holds no secret; its stream needs an admin's key, if there are keys."""

from typing import Final

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.console.files import HEADERS, page_files
from app.console.live import Live
from app.gateway import Gateway
from app.http.admin import authenticate_admin, refuse_elsewhere
from app.http.response import Streamed, StreamedResponse
from planes.wire.errors import HeadraceError, InvalidRequest

_log = structlog.get_logger()

_WHOLE_STATE_BYTES: Final = 4 << 20
"""May wait for a watcher, whatever answers to clients may: the state of some thousand workers."""


class NoSuchFile(InvalidRequest):
    """The console has no file of this name."""

    code = "not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"The console has no file {name[:100]!r}.")


def console_routes(gateway: Gateway, live: Live) -> list[Route]:
    """The routes of one gateway."""
    files = page_files()

    def file(request: Request, name: str) -> Response:
        refuse_elsewhere(gateway, request)
        found = files.get(name)
        if found is None:
            raise NoSuchFile(name)
        headers = {**HEADERS, "etag": found.etag}
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=headers)
        return Response(found.content, media_type=found.media_type, headers=headers)

    async def state(request: Request, response: StreamedResponse) -> None:
        """The console's stream: the fleet's state whole, then what changed, once a second."""
        try:
            authenticate_admin(gateway, request)
            with live.watched():
                response.begin([("x-content-type-options", "nosniff")])
                async for frame in live.frames():
                    response.write(frame)
                response.end()
        except HeadraceError as exc:
            response.fail(exc, [])
        except Exception as exc:  # noqa: BLE001 - our own bug: it is logged, and the watcher gets an answer all the same
            _log.exception("request.bug")
            response.fail(exc, [])

    async def page(request: Request) -> Response:
        """The console: a page that shows the fleet live."""
        return file(request, "index.html")

    async def asset(request: Request) -> Response:
        """What the console's page is made of."""
        return file(request, request.path_params["name"])

    streamed = Streamed(
        state,
        max_unsent_bytes=max(gateway.settings.slow_client_bytes, _WHOLE_STATE_BYTES),
        on_cut_off=gateway.metrics.client_cut_off,
    )
    return [
        Route("/console", page),
        streamed.route("/console/state"),
        Route("/console/{name:path}", asset),
    ]
