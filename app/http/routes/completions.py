"""`POST /v1/chat/completions` and `POST /v1/completions`; `GET /v1/models` and `/v1/models/{model}`."""

from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.gateway import Gateway
from app.http.routes.generate import generating_route
from app.http.routes.replies import json_reply
from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.openai.errors import ModelNotFound
from planes.wire.messages import Adapter


def completion_routes(gateway: Gateway) -> list[Route]:
    """The routes that generate, and the models they generate with."""

    async def models(request: Request) -> Response:
        """The models that registered workers serve and the key may use."""
        tenant = gateway.keys.authenticate(request.headers)
        names = {name: created for name, created in gateway.fleet.models().items() if tenant.may_use(name)}
        if _is_anthropic(request):
            names |= {each.name: each.created for each in gateway.adapters.available() if tenant.may_use(each.name)}
            listed = [_anthropic_model(gateway, name, created) for name, created in names.items()]
            ends = {"first_id": listed[0]["id"], "last_id": listed[-1]["id"]} if listed else {}
            return json_reply({"data": listed, "has_more": False, "first_id": None, "last_id": None, **ends})
        served = [_model(gateway, name, created) for name, created in names.items()]
        served += [_adapter(gateway, each) for each in gateway.adapters.available() if tenant.may_use(each.name)]
        return json_reply({"object": "list", "data": served})

    async def one(request: Request) -> Response:
        """One of the models; 404 if no worker serves it."""
        model: str = request.path_params["model"]
        tenant = gateway.keys.authenticate(request.headers)
        adapter = next((each for each in gateway.adapters.available() if each.name == model), None)
        if adapter is not None and tenant.may_use(model):
            if _is_anthropic(request):
                return json_reply(_anthropic_model(gateway, model, adapter.created))
            return json_reply(_adapter(gateway, adapter))
        if not tenant.may_use(model) or (created := gateway.fleet.models().get(model)) is None:
            raise ModelNotFound(model)
        shape = _anthropic_model if _is_anthropic(request) else _model
        return json_reply(shape(gateway, model, created))

    return [
        generating_route(
            gateway, "/v1/chat/completions", parse_chat, summary="Continue a conversation (OpenAI's chat completions)."
        ),
        generating_route(
            gateway, "/v1/completions", parse_completion, summary="Continue a text (OpenAI's completions)."
        ),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", one, name="model"),
    ]


def _model(gateway: Gateway, name: str, created: int) -> dict[str, object]:
    """As vLLM tells it: OpenAI's fields, and how long a prompt and its answer may be."""
    context_length = gateway.models.context_length(name)
    return {"id": name, "object": "model", "created": created, "owned_by": "headrace", "max_model_len": context_length}


def _adapter(gateway: Gateway, adapter: Adapter) -> dict[str, object]:
    """The same, and which model it changes."""
    return {**_model(gateway, adapter.name, adapter.created), "root": adapter.name, "parent": adapter.parent}


def _is_anthropic(request: Request) -> bool:
    """Anthropic's clients say so in every request, and expect another shape of a model."""
    return "anthropic-version" in request.headers


def _anthropic_model(gateway: Gateway, name: str, created: int) -> dict[str, object]:
    """Prompt and answer share one context: either may have all of it but a token."""
    context_length = gateway.models.context_length(name)
    most = None if context_length is None else context_length - 1
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": most,
        "max_tokens": most,
    }
