import json

import pytest

from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.openai.schema import Limits
from planes.wire.errors import InvalidRequest
from planes.wire.frames import StructuredOutput

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": 12345678901234567890}}}


def bound(limits=None, **fields):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode()
    return parse_chat(body, limits or Limits()).sampling.structured


def refusal(**fields):
    with pytest.raises(InvalidRequest) as caught:
        bound(**fields)
    return caught.value


def json_schema(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


def test_nothing_binds_a_plain_answer():
    assert bound() is None
    assert bound(response_format={"type": "text"}) is None


@pytest.mark.parametrize(
    ("fields", "binds"),
    [
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_schema='{"type":"object"}')),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_schema='{"type":"object"}')),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=["a", "b"])),
        ({"structured_outputs": {"grammar": "root ::= x"}}, StructuredOutput(grammar="root ::= x")),
        ({"structured_outputs": {"structural_tag": "{}"}}, StructuredOutput(structural_tag="{}")),
        ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
        ({"guided_choice": ["a"]}, StructuredOutput(choice=["a"])),
        ({"guided_grammar": "root ::= x"}, StructuredOutput(grammar="root ::= x")),
        ({"structured_outputs": {"json_object": False}}, None),
    ],
)
def test_every_way_to_say_what_an_answer_must_match(fields, binds):
    assert bound(**fields) == binds


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": json_schema(SCHEMA, strict=True)},
        {"response_format": json_schema(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_a_schema_arrives_word_for_word(fields):
    assert bound(**fields).json_schema == json.dumps(SCHEMA)


def test_a_structural_tag_is_a_response_format():
    tag = {"type": "structural_tag", "format": {"type": "any_text"}}
    assert json.loads(bound(response_format=tag).structural_tag) == tag


def test_completions_take_the_same():
    body = b'{"model": "m", "prompt": "x", "response_format": {"type": "json_object"}}'
    assert parse_completion(body).sampling.structured.json_schema == '{"type":"object"}'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": json_schema([1])}, "response_format.json_schema.schema"),
        ({"response_format": 3}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": {"json": "{"}}, None),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_choice": "a"}, "guided_choice.choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_binds_nothing_or_two_things_is_refused_by_name(fields, param):
    assert refusal(**fields).param == param


def test_a_schema_has_a_limit():
    with pytest.raises(InvalidRequest, match="the limit is 10"):
        bound(Limits(schema_bytes=10), guided_json=SCHEMA)
