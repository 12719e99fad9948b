import json

import msgspec
import pytest

from app.openai.chat_tools import parse_chat_tools
from app.openai.schema import NULL, Limits
from app.openai.tools import NO_TOOLS
from planes.wire.errors import InvalidRequest

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True}}
PATCH = {"type": "custom", "custom": {"name": "patch", "format": {"type": "text"}}}


def raw(value):
    return NULL if value is None else msgspec.Raw(json.dumps(value).encode())


def parse(tools=None, choice=None, parallel=None):
    return parse_chat_tools(raw(tools), raw(choice), raw(parallel), Limits())


def refusal(*args):
    with pytest.raises(InvalidRequest) as caught:
        parse(*args)
    return caught.value


def test_no_tools_are_none():
    assert parse() is NO_TOOLS
    assert parse([]) == NO_TOOLS
    assert parse([], "auto") == NO_TOOLS


def test_functions_are_shown_as_they_came():
    assert parse([WEATHER]).shown == (WEATHER,)


def test_a_custom_tool_is_told_apart():
    assert parse([WEATHER, PATCH]).parsing.custom == ["patch"]


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "weather"}}, "function:weather"),
        ({"type": "custom", "custom": {"name": "patch"}}, "function:patch"),
    ],
)
def test_every_choice_reaches_the_worker(choice, told):
    assert parse([WEATHER, PATCH], choice).parsing.tool_choice == told


def test_none_is_no_tools():
    assert parse([WEATHER], "none") == NO_TOOLS


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_those_that_may_be_called(mode):
    listed = [{"type": "custom", "custom": {"name": "patch"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}
    told = parse([WEATHER, PATCH], choice).parsing
    assert [tool["function"]["name"] for tool in json.loads(told.tools)] == ["patch"]
    assert told.tool_choice == mode


def test_parallel_calls_can_be_switched_off():
    assert not parse([WEATHER], None, False).parsing.is_parallel


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "web_search"}], "tools[0].type"),
        ([WEATHER, {"type": "function"}], "tools[1]"),
        ([{"type": "function", "function": {"name": 3}}], "tools[0].function.name"),
        ({"type": "function"}, "tools"),
    ],
)
def test_what_is_no_tool_is_refused_by_name(tools, param):
    assert refusal(tools).param == param


@pytest.mark.parametrize("choice", ["sometimes", {"type": "function"}, {"type": "mcp"}, 3, {"type": "allowed_tools"}])
def test_what_is_no_choice_is_refused_by_name(choice):
    assert refusal([WEATHER], choice).param == "tool_choice"


def test_a_wrong_type_is_refused_with_its_place_and_value():
    told = str(refusal([WEATHER], {"type": "function", "function": {"name": 7}}))
    assert "tool_choice.function.name" in told
    assert told.endswith("the value is 7.")
