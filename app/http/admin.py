"""Who may see what is everybody's, and the port of operators (ADR 40).

| the gateway has                      | `/metrics`, `/v1/fleet`, the console and the routes of adapters   |
|--------------------------------------|-------------------------------------------------------------------|
| `--admin-port` on a loopback address | on that port alone, for whoever reaches it                        |
| one that others reach, and keys      | on that port alone, for keys that were made with `--admin`        |
| keys, no such port                   | for keys that were made with `--admin`                            |
| neither                              | for everybody                                                     |

All usage and all routes are told to the same people; with keys, at the main port too, to an admin's. The admin port
serves `/live` and `/health` as well, and nothing that generates.
"""

from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.gateway import Gateway
from app.http.routes.replies import error_reply
from app.keys.tenant import ANYBODY, Tenant
from planes.wire.errors import InvalidRequest
from planes.wire.urls import is_loopback

_MARK: Final = "headrace.admin"
_TOLD: Final = ("/live", "/health", "/metrics", "/v1/fleet", "/v1/usage", "/v1/routes", "/console", "/openapi.json")
_PATHS: Final = (*_TOLD, "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class OnAdminPort(InvalidRequest):
    """It is served, and not here."""

    code = "not_found"

    def __init__(self) -> None:
        super().__init__("This is for operators, at this gateway's --admin-port; commands find it with --url.")


class NotOnAdminPort(InvalidRequest):
    """The admin port is asked for something else."""

    code = "not_found"

    def __init__(self, path: str) -> None:
        super().__init__(f"{path[:200]!r} is not served at the admin port; ask the gateway's own.")


def admin_app(app: ASGIApp) -> ASGIApp:
    """`app` as the admin port serves it."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if any(path == each or path.startswith(f"{each}/") for each in _PATHS):
            await app({**scope, _MARK: True}, receive, send)
        else:
            await error_reply(NotOnAdminPort(path))(scope, receive, send)

    return serve


def authenticate(gateway: Gateway, request: Request) -> Tenant:
    """Who asks; at the admin port somebody who may see all.  Raises:  Unauthenticated, KeysUnknown, AdminOnly."""
    if request.scope.get(_MARK):
        return authenticate_admin(gateway, request)
    return gateway.keys.authenticate(request.headers)


def authenticate_admin(gateway: Gateway, request: Request) -> Tenant:
    """The same for what is everybody's.  Raises:  OnAdminPort too."""
    refuse_elsewhere(gateway, request)
    if request.scope.get(_MARK) and is_loopback(gateway.settings.admin_host):
        return ANYBODY
    return gateway.keys.authenticate_admin(request.headers)


def refuse_elsewhere(gateway: Gateway, request: Request) -> None:
    """Raises:  OnAdminPort if there is a port for operators, and this is another."""
    if gateway.settings.admin_port is not None and not request.scope.get(_MARK):
        raise OnAdminPort
