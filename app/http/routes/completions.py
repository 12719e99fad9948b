"""`POST /v1/chat/completions` and `POST /v1/completions`; `GET /v1/models` and `/v1/models/{model}`."""

import structlog
from fastapi import APIRouter, Request, Response
from starlette.routing import Route

from app.gateway import Gateway
from app.http.intake import Parse, read_request
from app.http.response import Streamed, StreamedResponse
from app.http.routes.replies import json_reply
from app.metrics import RequestSummary
from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.openai.errors import ModelNotFound, code_of
from app.serving.relay import fail
from planes.wire.errors import HeadraceError, InvalidRequest

_log = structlog.get_logger()


def completion_routes(gateway: Gateway) -> APIRouter:
    """The routes that generate, and the models they generate with."""
    routes = APIRouter()

    async def chat(request: Request, response: StreamedResponse) -> None:
        """Continue a conversation (OpenAI's chat completions)."""
        await _serve(gateway, request, parse_chat, response)

    async def completion(request: Request, response: StreamedResponse) -> None:
        """Continue a text (OpenAI's completions)."""
        await _serve(gateway, request, parse_completion, response)

    for path, produce in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        streamed = Streamed(
            produce,
            max_unsent_bytes=gateway.settings.slow_client_bytes,
            on_cut_off=gateway.metrics.client_cut_off,
        )
        routes.routes.append(Route(path, streamed, methods=["POST"]))

    @routes.get("/v1/models", response_model=None)
    async def models(request: Request) -> Response:
        """The models that registered workers serve."""
        gateway.keys.authenticate(request.headers)
        listed = [_model(name, created) for name, created in gateway.fleet.models().items()]
        return json_reply({"object": "list", "data": listed})

    @routes.get("/v1/models/{model:path}", response_model=None)
    async def model(request: Request, model: str) -> Response:
        """One of the models; 404 if no worker serves it."""
        gateway.keys.authenticate(request.headers)
        if (created := gateway.fleet.models().get(model)) is None:
            raise ModelNotFound(model)
        return json_reply(_model(model, created))

    return routes


def _model(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "headrace"}


def _why(exc: HeadraceError) -> dict[str, str | None]:
    """For the log: what is wrong with a request is told without its words, which are the client's."""
    return {"param": exc.param} if isinstance(exc, InvalidRequest) else {"reason": str(exc)}


async def _serve(gateway: Gateway, request: Request, parse: Parse, response: StreamedResponse) -> None:
    request_id = gateway.new_request_id()
    # A dictionary, because starlette's own headers are searched one by one for each that is not there.
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}
    try:
        tenant = gateway.keys.authenticate(headers)
        with gateway.keys.admitted(tenant) as slots:
            job = await read_request(
                gateway, request, headers=headers, tenant=tenant, request_id=request_id, parse=parse
            )
            slots.widen(job.sampling.n)
            await gateway.relay.run(job, response)
    except HeadraceError as exc:
        code = code_of(exc)
        gateway.metrics.ended(RequestSummary(model="", code=code))
        _log.info("request.finished", request_id=request_id, outcome=code, **_why(exc))
        fail(response, exc, [("x-request-id", request_id)])
    except Exception as exc:  # noqa: BLE001 - our own bug: it is logged, and the client gets an answer all the same
        _log.exception("request.bug", request_id=request_id)
        fail(response, exc, [("x-request-id", request_id)])
