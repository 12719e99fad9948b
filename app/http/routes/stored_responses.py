"""OpenAI's responses, kept: those below `/v1/responses/{id}`. Any gateway of the namespace answers for any other."""

from typing import Any, Final

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.gateway import Gateway
from app.http.response import Streamed, StreamedResponse
from app.http.routes.replies import json_reply
from app.keys.tenant import Tenant
from app.openai.responses.items import listed_items
from app.responses.background import Wish
from app.responses.follow import NotStreamed, follow
from planes.wire.errors import HeadraceError, InvalidRequest

_log = structlog.get_logger()

JSON: Final = ("content-type", "application/json")
"""The header of an answer in one piece."""
_MAX_LISTED, _DEFAULT_LISTED = 100, 20


class NotCancellable(InvalidRequest):
    """It runs for its client, who cancels it by going."""

    code = "not_cancellable"

    def __init__(self, response: str) -> None:
        super().__init__(f"The response '{response}' was not created with 'background'; only such can be cancelled.")


def stored_response_routes(gateway: Gateway) -> list[Route]:
    """The routes of one gateway."""

    async def retrieve(request: Request, response: StreamedResponse) -> None:
        """A kept response; `?stream=true`: its events, those after number `starting_after` if that is given."""
        try:
            tenant, found = gateway.keys.authenticate(request.headers), request.path_params["response_id"]
            record = await gateway.background.find(tenant.name, found)
            if not _is_true(request, "stream"):
                response.whole(200, [JSON], record.body)
                return
            if not record.is_streamed:
                raise NotStreamed(found)  # noqa: TRY301 - told as all others are
            await send_stream(gateway, tenant, found, _number(request, "starting_after", -1), response)
        except HeadraceError as exc:
            response.fail(exc, [])
        except Exception as exc:  # noqa: BLE001 - our own bug: it is logged, and the client gets an answer all the same
            _log.exception("request.bug")
            response.fail(exc, [])

    async def delete(request: Request) -> Response:
        """Forget a kept response; one that runs in the background is stopped."""
        response_id: str = request.path_params["response_id"]
        tenant = gateway.keys.authenticate(request.headers)
        await gateway.background.find(tenant.name, response_id, Wish.DISCARD)
        await gateway.responses.delete(tenant.name, response_id)
        return json_reply({"id": response_id, "object": "response", "deleted": True})

    async def cancel(request: Request) -> Response:
        """Stop a response that runs in the background; one that has ended stays as it is."""
        response_id: str = request.path_params["response_id"]
        tenant = gateway.keys.authenticate(request.headers)
        record = await gateway.background.find(tenant.name, response_id, Wish.CANCEL)
        if not record.is_background:
            raise NotCancellable(response_id)
        return Response(record.body, media_type="application/json")

    async def input_items(request: Request) -> Response:
        """The items that a kept response answers, in pages; the latest first, unless `order` is asc."""
        response_id: str = request.path_params["response_id"]
        tenant = gateway.keys.authenticate(request.headers)
        lists = await gateway.responses.items(tenant.name, response_id)
        raw = [item for one in lists for item in msgspec.json.decode(one, type=list[msgspec.Raw])]
        return json_reply(_page(request, listed_items(response_id, raw)))

    streamed = Streamed(
        retrieve, max_unsent_bytes=gateway.settings.slow_client_bytes, on_cut_off=gateway.metrics.client_cut_off
    )
    return [
        streamed.route("/v1/responses/{response_id}"),
        Route("/v1/responses/{response_id}", delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/cancel", cancel, methods=["POST"]),
        Route("/v1/responses/{response_id}/input_items", input_items),
    ]


async def send_stream(
    gateway: Gateway,
    tenant: Tenant,
    response_id: str,
    after: int,
    response: StreamedResponse,
    headers: list[tuple[str, str]] | None = None,
) -> None:
    """The events of a background response, those after number `after`, until its last one.  Raises:  HeadraceError."""
    response.begin(headers or [])
    async for events in follow(gateway.responses, gateway.background, tenant.name, response_id, after=after):
        if events:
            response.write(events)
        elif gateway.settings.sse_keepalive_s:
            response.keep_alive()
    response.end()


def _page(request: Request, items: list[dict[str, Any]]) -> dict[str, Any]:
    order, limit = request.query_params.get("order", "desc"), _number(request, "limit", _DEFAULT_LISTED)
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"Invalid 'order': {order[:100]!r} is not one of asc, desc.", param="order")
    if not 1 <= limit <= _MAX_LISTED:
        raise InvalidRequest(f"Invalid 'limit': {limit} is out of range; it must be from 1 to 100.", param="limit")
    if order == "desc":
        items.reverse()
    if (after := request.query_params.get("after")) is not None:
        place = next((at for at, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise InvalidRequest(f"Invalid 'after': there is no item {after[:100]!r}.", param="after")
        items = items[place + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": len(items) > limit,
    }


def _is_true(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("true", "1")


def _number(request: Request, name: str, default: int) -> int:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise InvalidRequest(f"Invalid '{name}': {value[:100]!r} is not a number.", param=name)
    return int(value)
