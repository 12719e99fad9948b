import json
import re
from types import SimpleNamespace

import jsonschema
import pytest
from starlette.routing import Route

from app.anthropic import errors as anthropic_errors
from app.http.openapi import DETAILS, described
from app.http.response import Streamed
from app.main import create_app
from app.metrics import Metrics
from app.openai import errors as openai_errors
from app.openai.bodies import ChatBody
from app.settings import GatewaySettings
from planes.wire.errors import InvalidRequest

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def app():
    return create_app(SimpleNamespace(settings=GatewaySettings(), metrics=Metrics(), live=object()))


@pytest.fixture(scope="module")
def document(app):
    return json.loads(json.dumps(described(app.routes, version="1")))


def operations(document):
    return {(method.upper(), path): op for path, each in document["paths"].items() for method, op in each.items()}


def validator(document, schema):
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


def body_schema(document, path):
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_every_route_is_described(app, document):
    routes = {
        (method, route.path.replace(":path}", "}"))
        for route in app.routes
        if isinstance(route, Route) and route.path != "/openapi.json"
        for method in route.methods - {"HEAD"}
    }
    assert set(operations(document)) == routes
    ids = [op["operationId"] for op in operations(document).values()]
    assert len(ids) == len(set(ids))


def test_what_is_streamed_answers_no_head_which_would_get_a_body(app):
    heads = {
        route.path: "HEAD" in route.methods
        for route in app.routes
        if isinstance(route, Route) and "GET" in route.methods and isinstance(route.endpoint, Streamed)
    }
    assert heads == {"/v1/responses/{response_id}": False, "/console/state": False}


def test_every_route_that_takes_a_body_says_which(document):
    """Whoever adds a route: say in `app/http/openapi.py` (DETAILS) what it takes and how it answers."""
    takes_none = {("POST", "/v1/responses/{response_id}/cancel")}
    posts = {each for each in operations(document) if each[0] == "POST"} - takes_none
    assert {each for each in operations(document) if "requestBody" in operations(document)[each]} == posts
    assert set(DETAILS) <= set(operations(document)), "details of routes that there are not"


def test_references_lead_somewhere(document):
    references = set(re.findall(r'"#/components/schemas/([^"]*)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


def test_every_field_of_a_body_is_described(document):
    properties = document["components"]["schemas"]["ChatBody"]["properties"]
    assert list(properties) == list(ChatBody.__struct_fields__)
    assert properties["use_beam_search"]["enum"] == [None, False], "what asks for nothing"
    assert document["components"]["schemas"]["ChatBody"]["required"] == ["model", "messages"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "m", "messages": USER, "tools": [{}], "unknown": 1, "stop": ["a"]}),
        ("/v1/completions", {"model": "m", "prompt": [1, 2], "stream_options": None}),
        ("/v1/responses", {"model": "m", "input": USER, "reasoning": {"effort": "low"}, "tools": [{"type": "x"}]}),
        (
            "/v1/messages",
            {
                "model": "m",
                "max_tokens": 1,
                "messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text"}]}]}],
            },
        ),
        ("/v1/messages/count_tokens", {"model": "m", "messages": USER}),
    ],
)
def test_bodies_are_what_their_schemas_say(document, path, body):
    check = validator(document, body_schema(document, path))
    check.validate(body)
    assert not check.is_valid({"messages": USER}), "it has no model"
    assert not check.is_valid({**body, "model": 7})
    for field in ("max_tokens", "temperature"):
        assert not check.is_valid({**body, field: "many"}) or path.endswith("count_tokens")


@pytest.mark.parametrize(
    ("path", "errors"), [("/v1/chat/completions", openai_errors), ("/v1/messages", anthropic_errors)]
)
def test_errors_are_what_their_schemas_say(document, path, errors):
    responses = document["paths"][path]["post"]["responses"]
    for exc in (InvalidRequest("no", param="x"), InvalidRequest("no", code="model_not_found"), ValueError("x")):
        answer = errors.response(exc)
        schema = responses[str(answer.status)]["content"]["application/json"]["schema"]["anyOf"][0]
        validator(document, schema).validate(json.loads(answer.body))
        assert not validator(document, schema).is_valid({"detail": "no"})


def test_a_generating_route_documents_every_status_of_the_table_of_errors(document):
    table = {int(number) for number in re.findall(r"\| (\d{3}) ", openai_errors.__doc__)} | {400, 503}
    documented = {int(status) for status in document["paths"]["/v1/chat/completions"]["post"]["responses"]}
    assert table - {403, 405} == documented - {200}


def test_streams_and_their_parameters_are_described(document):
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {each["name"] for each in chat["parameters"]} == {
        "x-headrace-handover",
        "x-headrace-explain",
        "x-headrace-slo-ttft-ms",
        "x-headrace-slo-itl-ms",
    }
    kept = document["paths"]["/v1/responses/{response_id}"]["get"]["parameters"]
    assert [(each["name"], each["in"]) for each in kept] == [
        ("response_id", "path"),
        ("stream", "query"),
        ("starting_after", "query"),
    ]
