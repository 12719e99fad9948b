"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.anthropic import errors
from app.anthropic.message import parse_count, parse_message
from app.gateway import Gateway
from app.http.intake import Parse, model_of, parsed_body
from app.http.routes.generate import generating_route
from app.http.routes.replies import error_reply, json_reply, with_ignored
from planes.wire.errors import HeadraceError


def message_routes(gateway: Gateway) -> list[Route]:
    """Both routes."""
    count = partial(parse_count, limits=gateway.settings.body_limits)

    async def count_tokens(request: Request) -> Response:
        """How many tokens a conversation would have as a prompt."""
        try:
            num_tokens, ignored = await _num_tokens(gateway, request, count)
        except HeadraceError as exc:
            return error_reply(exc, errors)
        return with_ignored(json_reply({"input_tokens": num_tokens}), ignored, gateway.metrics)

    return [
        generating_route(
            gateway,
            "/v1/messages",
            parse_message,
            summary="Continue a conversation (Anthropic's messages).",
            errors=errors,
        ),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


async def _num_tokens(gateway: Gateway, request: Request, parse: Parse) -> tuple[int, tuple[str, ...]]:
    """Of the prompt; and the names of the fields that nobody knows."""
    async with parsed_body(gateway, request, parse) as (parsed, tenant, deadline):
        model = model_of(gateway, tenant, parsed.model)
        return len(await gateway.preprocessor.tokenize(parsed, model, deadline=deadline)), parsed.ignored
