"""What operators ask: health, metrics, the fleet, why a request went where it went, and where its time went."""

from dataclasses import asdict
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.fleet.routing_config import RoutingConfigFollower
from app.gateway import Gateway
from app.http.admin import authenticate, authenticate_admin
from app.http.intake import read_request
from app.http.routes.replies import json_reply, with_ignored
from app.openai.chat import parse_chat
from app.processes import answers
from planes.wire.errors import InvalidRequest

_DEFAULT_LISTED = 50
MOST_ROUTES_LISTED = 1000


class UnknownRequest(InvalidRequest):
    """No decision is kept for this request, or none that this tenant may see: which of the two is not told."""

    code = "not_found"

    def __init__(self, request: str) -> None:
        super().__init__(
            f"No decision is kept for request {request[:100]!r}: it never was, is too long ago, or is not yours."
        )


def operation_routes(gateway: Gateway) -> list[Route]:
    """The routes for operators. Who may see what: `app/http/admin.py`."""
    parse = partial(parse_chat, limits=gateway.settings.body_limits)

    async def live(_: Request) -> Response:
        """Whether the process runs."""
        return json_reply({"status": "ok"})

    async def health(_: Request) -> Response:
        """Whether some worker could serve a request now; 503 if not, or if this gateway is about to stop."""
        found = await answers.health(gateway)
        told: dict[str, object] = {"status": found.status, "workers": found.workers}
        if gateway.siblings is not None:
            told["processes"] = found.num_processes
        return json_reply(told, 200 if found.status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus; at `--admin-port`, or with an admin's key where there are keys."""
        authenticate_admin(gateway, request)
        return Response(await answers.metrics(gateway), media_type=CONTENT_TYPE_LATEST)

    async def fleet(request: Request) -> Response:
        """The workers, models, splits; the router's view, speeds; why roles change. As `/metrics`: for operators."""
        authenticate_admin(gateway, request)
        return json_reply(
            {
                "process": answers.process(gateway),
                "num_waiting": gateway.dispatcher.num_waiting,
                "workers": gateway.fleet.statuses(),
                "models": gateway.models.statuses(),
                "warnings": list(gateway.fleet.splits.values()),
                "router": gateway.router.workers(now=gateway.clock()),
                "links": gateway.router.links(),
                "routing": _routing(gateway.routing_config),
                "autorole": None if gateway.autorole is None else gateway.autorole.told,
            }
        )

    async def recent(request: Request) -> Response:
        """The timelines of the last requests of yours (an admin: of all) that have ended, the latest first."""
        tenant = authenticate(gateway, request)
        told = await answers.recent(gateway, tenant, _num_listed(request))
        return json_reply({"object": "list", "data": told})

    async def explain(request: Request) -> Response:
        """Why a recent request of yours went where it went, and where its time went; `earlier`: its attempts before."""
        request_id: str = request.path_params["request_id"]
        tenant = authenticate(gateway, request)
        told = await answers.explained(gateway, request_id, tenant)
        if told is None:
            raise UnknownRequest(request_id)
        return json_reply(told)

    async def preview(request: Request) -> Response:
        """Where a chat body would go now, without running it."""
        tenant = authenticate(gateway, request)
        with gateway.keys.admitted(tenant):
            job = await read_request(
                gateway,
                request,
                headers=request.headers,
                tenant=tenant,
                request_id=gateway.new_request_id(),
                parse=parse,
            )
        now = gateway.clock()
        asked = job.routable(num_tokens=0, excluded=frozenset(), is_retry=False)
        return with_ignored(
            json_reply(answers.explanation_told(gateway.router.preview(asked, now=now), now, gateway.wall_clock())),
            job.ignored,
            gateway.metrics,
        )

    return [
        Route("/live", live),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/fleet", fleet),
        Route("/v1/routes", recent),
        Route("/v1/routes/{request_id}", explain),
        Route("/v1/routes", preview, methods=["POST"]),
    ]


def _num_listed(request: Request) -> int:
    """Raises:  InvalidRequest."""
    value = request.query_params.get("limit", str(_DEFAULT_LISTED))
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= MOST_ROUTES_LISTED):
        raise InvalidRequest(
            f"Invalid 'limit': it is {value[:100]!r} and must be from 1 to {MOST_ROUTES_LISTED}.", param="limit"
        )
    return int(value)


def _routing(config: RoutingConfigFollower) -> dict[str, Any]:
    """As JSON: every setting in force under its name in `headrace config`, and what is wrong with those refused."""
    found = config.in_force
    return {
        "policy": found.policy.name,
        "shadow_policy": None if found.shadow is None else found.shadow.name,
        **asdict(found.settings),
        "refused_because": config.refused_because,
    }
