"""`POST /v1/chat/completions` and `POST /v1/completions`; `GET /v1/models` and `/v1/models/{model}`."""

from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from app.gateway import Gateway
from app.http.routes.generate import generating_route
from app.http.routes.replies import json_reply
from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.openai.errors import ModelNotFound
from app.openai.schema import Limits, ParsedRequest


def completion_routes(gateway: Gateway) -> APIRouter:
    """The routes that generate, and the models they generate with."""
    routes = APIRouter()
    limits = Limits(has_strict_fields=gateway.settings.strict_fields)

    def chat(body: bytes) -> ParsedRequest:
        return parse_chat(body, limits)

    def completion(body: bytes) -> ParsedRequest:
        return parse_completion(body, limits)

    routes.routes += [
        generating_route(
            gateway, "/v1/chat/completions", chat, summary="Continue a conversation (OpenAI's chat completions)."
        ),
        generating_route(gateway, "/v1/completions", completion, summary="Continue a text (OpenAI's completions)."),
    ]

    @routes.get("/v1/models", response_model=None)
    async def models(request: Request) -> Response:
        """The models that registered workers serve."""
        gateway.keys.authenticate(request.headers)
        models = gateway.fleet.models()
        if _is_anthropic(request):
            listed = [_anthropic_model(name, created) for name, created in models.items()]
            ends = {"first_id": listed[0]["id"], "last_id": listed[-1]["id"]} if listed else {}
            return json_reply({"data": listed, "has_more": False, "first_id": None, "last_id": None, **ends})
        return json_reply({"object": "list", "data": [_model(name, created) for name, created in models.items()]})

    @routes.get("/v1/models/{model:path}", response_model=None)
    async def model(request: Request, model: str) -> Response:
        """One of the models; 404 if no worker serves it."""
        gateway.keys.authenticate(request.headers)
        if (created := gateway.fleet.models().get(model)) is None:
            raise ModelNotFound(model)
        return json_reply(_anthropic_model(model, created) if _is_anthropic(request) else _model(model, created))

    return routes


def _model(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "headrace"}


def _is_anthropic(request: Request) -> bool:
    """Anthropic's clients say so in every request, and expect another shape of a model."""
    return "anthropic-version" in request.headers


def _anthropic_model(name: str, created: int) -> dict[str, object]:
    since = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": "model", "id": name, "display_name": name, "created_at": since}
