"""The API's description, `GET /openapi.json`: every route with its parameters, its body, and how it can answer.

Paths and summaries come from the routes themselves, bodies from the structs that they are decoded into, statuses from
the table of errors. What a route has beyond that is told here (`DETAILS`): a test demands it of each that takes a body.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from app.anthropic import errors as anthropic_errors
from app.anthropic.schema import ConversationBody, MessageBody
from app.http.json_schema import Schemas
from app.http.routes.adapters import LoadAdapterBody, UnloadAdapterBody
from app.http.routes.operations import MOST_ROUTES_LISTED
from app.http.routes.replies import json_reply
from app.openai import errors as openai_errors
from app.openai.bodies import UNSUPPORTED_CHAT, UNSUPPORTED_COMPLETION, ChatBody, CompletionBody
from app.openai.embeddings import EmbeddingBody
from app.openai.responses.bodies import UNSUPPORTED_RESPONSE, ResponseBody
from app.openai.sampling import LEAST_MS, MOST_MS
from app.openai.schema import Json
from app.openai.tokenize import UNSUPPORTED_TOKENIZE, DetokenizeBody, TokenizeBody


@dataclass(frozen=True, slots=True)
class RouteDetails:
    """body: what it takes.  is_streamed: it may answer with server-sent events.  query: parameters and their schemas.

    statuses: of errors, beside those that every route of its method has.  error: their shape.
    is_open: no key is needed.  media_type: of the answer.
    """

    body: type[msgspec.Struct] | None = None
    is_streamed: bool = False
    query: tuple[tuple[str, dict[str, Json]], ...] = ()
    statuses: frozenset[int] = frozenset()
    error: type[msgspec.Struct] = openai_errors.ErrorBody
    is_open: bool = False
    media_type: str = "application/json"


_CONNECTION: Final = frozenset({400, 404, 408, 429, 431, 500, 503})
"""What any request can be answered, before or after a route has seen it."""
_BODY: Final = frozenset({413, 415, 504})
_GENERATING: Final = frozenset({409, 502})
_KEY: Final = frozenset({401})
_STORE: Final = frozenset({504})
_OPERATORS: Final = frozenset({403})

_MILLISECONDS: Final[dict[str, Json]] = {"type": "number", "minimum": LEAST_MS, "maximum": MOST_MS}
_WISHES: Final[tuple[tuple[str, dict[str, Json]], ...]] = (
    ("x-headrace-handover", {"type": "string", "enum": ["auto", "always", "never"]}),
    ("x-headrace-explain", {"type": "string", "enum": ["0", "1"]}),
    ("x-headrace-slo-ttft-ms", _MILLISECONDS),
    ("x-headrace-slo-itl-ms", _MILLISECONDS),
)
_OBJECT: Final[dict[str, Json]] = {"type": "object"}
_ANTHROPIC: Final = anthropic_errors.ErrorBody
_OPEN: Final = RouteDetails(is_open=True)
DETAILS: Final[dict[tuple[str, str], RouteDetails]] = {
    ("POST", "/v1/chat/completions"): RouteDetails(ChatBody, is_streamed=True, statuses=_GENERATING),
    ("POST", "/v1/completions"): RouteDetails(CompletionBody, is_streamed=True, statuses=_GENERATING),
    ("POST", "/v1/responses"): RouteDetails(ResponseBody, is_streamed=True, statuses=_GENERATING),
    ("POST", "/v1/responses/input_tokens"): RouteDetails(ResponseBody),
    ("POST", "/v1/messages"): RouteDetails(MessageBody, is_streamed=True, statuses=_GENERATING, error=_ANTHROPIC),
    ("POST", "/v1/messages/count_tokens"): RouteDetails(ConversationBody, error=_ANTHROPIC),
    ("POST", "/v1/routes"): RouteDetails(ChatBody),
    ("GET", "/v1/routes"): RouteDetails(
        query=(("limit", {"type": "integer", "minimum": 1, "maximum": MOST_ROUTES_LISTED}),)
    ),
    ("POST", "/v1/embeddings"): RouteDetails(EmbeddingBody, statuses=_GENERATING),
    ("POST", "/tokenize"): RouteDetails(TokenizeBody),
    ("POST", "/detokenize"): RouteDetails(DetokenizeBody),
    ("GET", "/v1/responses/{response_id}"): RouteDetails(
        is_streamed=True,
        statuses=_STORE,
        query=(("stream", {"type": "boolean"}), ("starting_after", {"type": "integer", "minimum": 0})),
    ),
    ("DELETE", "/v1/responses/{response_id}"): RouteDetails(statuses=_STORE),
    ("POST", "/v1/responses/{response_id}/cancel"): RouteDetails(statuses=_STORE),
    ("GET", "/v1/responses/{response_id}/input_items"): RouteDetails(
        statuses=_STORE,
        query=(
            ("after", {"type": "string"}),
            ("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
            ("order", {"type": "string", "enum": ["asc", "desc"]}),
        ),
    ),
    ("GET", "/v1/usage"): RouteDetails(
        query=(
            ("start", {"type": "string", "format": "date"}),
            ("end", {"type": "string", "format": "date"}),
            ("format", {"type": "string", "enum": ["csv", "json"]}),
            ("key", {"type": "string"}),
        ),
    ),
    ("POST", "/v1/load_lora_adapter"): RouteDetails(LoadAdapterBody, statuses=_OPERATORS, media_type="text/plain"),
    ("POST", "/v1/unload_lora_adapter"): RouteDetails(UnloadAdapterBody, statuses=_OPERATORS, media_type="text/plain"),
    ("GET", "/live"): _OPEN,
    ("GET", "/health"): _OPEN,
    ("GET", "/console"): RouteDetails(is_open=True, media_type="text/html"),
    ("GET", "/console/{name}"): RouteDetails(is_open=True, media_type="text/javascript"),
    ("GET", "/console/state"): RouteDetails(is_streamed=True, statuses=frozenset({403})),
    ("GET", "/metrics"): RouteDetails(statuses=_OPERATORS, media_type="text/plain"),
    ("GET", "/v1/fleet"): RouteDetails(statuses=_OPERATORS),
}
_PLAIN: Final = RouteDetails()

_REFUSED: Final[dict[str, dict[str, tuple[Json, ...]]]] = {
    "ChatBody": UNSUPPORTED_CHAT,
    "CompletionBody": UNSUPPORTED_COMPLETION,
    "ResponseBody": UNSUPPORTED_RESPONSE,
    "TokenizeBody": UNSUPPORTED_TOKENIZE,
}


def description_route(routes: Sequence[BaseRoute], *, version: str) -> Route:
    """`GET /openapi.json`: `described`, made when somebody asks for it."""
    description = functools.cache(functools.partial(described, routes, version=version))

    async def openapi(_: Request) -> Response:
        """All of this, as OpenAPI 3.1."""
        return json_reply(description())

    return Route("/openapi.json", openapi, include_in_schema=False)


def described(routes: Sequence[BaseRoute], *, version: str) -> dict[str, Json]:
    """An OpenAPI 3.1 document of those routes that tell what they do."""
    kinds = {each for details in DETAILS.values() for each in (details.body, details.error) if each is not None}
    refused = {kind: {name: _refusal(values) for name, values in each.items()} for kind, each in _REFUSED.items()}
    schemas = Schemas(sorted(kinds, key=lambda kind: (kind.__module__, kind.__name__)), refused)
    paths: dict[str, dict[str, Json]] = {}
    for route in routes:
        if not isinstance(route, Route) or not route.include_in_schema:
            continue
        if summary := (route.endpoint.__doc__ or "").strip().split("\n")[0]:
            path = route.path.replace(":path}", "}")
            for method in sorted((route.methods or set()) - {"HEAD"}):
                paths.setdefault(path, {})[method.lower()] = _operation(method, path, route.name, summary, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(method: str, path: str, name: str, summary: str, schemas: Schemas) -> dict[str, Json]:
    details = DETAILS.get((method, path), _PLAIN)
    parameters = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
        for part in path.split("/")
        if part.startswith("{")
    ]
    parameters += [{"name": each, "in": "query", "schema": schema} for each, schema in details.query]
    if details.body is not None and details.is_streamed:
        parameters += [{"name": each, "in": "header", "schema": schema} for each, schema in _WISHES]
    found: dict[str, Json] = {
        "operationId": name,
        "summary": summary,
        "parameters": parameters,
        "responses": _responses(details, schemas),
        "security": [] if details.is_open else [{}, {"key": []}],
    }
    if details.body is not None:
        content = {"application/json": {"schema": schemas.ref(details.body)}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _responses(details: RouteDetails, schemas: Schemas) -> dict[str, Json]:
    plain: dict[str, Json] = {details.media_type: {"schema": {} if details.media_type == "text/plain" else _OBJECT}}
    if details.is_streamed:
        plain["text/event-stream"] = {"schema": {}}  # some read it as that of the stream, others of each event
    statuses = _CONNECTION | details.statuses
    if details.body is not None:
        statuses |= _BODY
    if not details.is_open:
        statuses |= _KEY
    failures = {
        str(status): {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": {"anyOf": [schemas.ref(details.error), *_other(details)]}}},
        }
        for status in sorted(statuses)
    }
    return {"200": {"description": "OK", "content": plain}, **failures}


def _other(details: RouteDetails) -> list[dict[str, Json]]:
    """`/health` says by its status alone that it is not well; a broken connection is told in OpenAI's shape."""
    return [_OBJECT] if details.is_open or details.error is _ANTHROPIC else []


def _refusal(values: tuple[Json, ...]) -> dict[str, Json]:
    return {"enum": [None, *values], "description": "Not served: any other value is refused."}
