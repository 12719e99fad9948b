import json

import jsonschema
import pytest

from app.openai.schema import Limits
from app.openai.tools import NO_TOOLS, Mode, Tool, ToolChoice, custom_tool, use_of
from planes.wire.errors import InvalidRequest

ANY, LIMITS = ToolChoice(), Limits()
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("weather", "Of a city.", CITY)
TIME = Tool("time")
TREE = Tool(
    "plant",
    parameters={
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}, "again": {"$ref": "#"}},
        "required": ["root"],
        "$defs": {"node": {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}},
    },
)


def use(*tools, choice=ANY, limits=LIMITS, **options):
    return use_of(tools, choice, limits, **options)


def names(shown):
    return [tool["function"]["name"] for tool in shown]


def schema_of(used):
    return json.loads(used.structured.json_schema)


def is_valid(used, answer):
    return jsonschema.Draft202012Validator(schema_of(used)).is_valid(answer)


def test_auto_shows_the_tools_and_looks_for_calls_without_binding_the_answer():
    used = use(WEATHER, TIME)
    assert used.shown == (
        {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}},
        {"type": "function", "function": {"name": "time"}},
    )
    assert json.loads(used.parsing.tools) == list(used.shown)
    assert (used.parsing.tool_choice, used.parsing.is_parallel, used.structured) == ("auto", True, None)


def test_none_neither_shows_nor_looks_for_tools():
    assert use(WEATHER, choice=ToolChoice(Mode.NONE)) == NO_TOOLS


def test_required_binds_the_answer_to_a_list_of_calls():
    used = use(WEATHER, TIME, choice=ToolChoice(Mode.REQUIRED))
    assert used.parsing.tool_choice == "required"
    assert is_valid(used, [{"name": "weather", "parameters": {"city": "Rome"}}, {"name": "time", "parameters": {}}])
    for wrong in (
        [],
        {"name": "time", "parameters": {}},
        [{"name": "else", "parameters": {}}],
        [{"name": "weather", "parameters": {}}],
        [{"name": "weather"}],
    ):
        assert not is_valid(used, wrong)


def test_without_parallel_calls_there_is_one():
    used = use(TIME, choice=ToolChoice(Mode.REQUIRED), is_parallel=False)
    call = {"name": "time", "parameters": {}}
    assert is_valid(used, [call])
    assert not is_valid(used, [call, call])
    assert not used.parsing.is_parallel


def test_a_named_tool_binds_the_answer_to_its_arguments_and_every_tool_stays_in_the_prompt():
    used = use(TIME, WEATHER, choice=ToolChoice(Mode.REQUIRED, named="weather"))
    assert used.parsing.tool_choice == "function:weather"
    assert schema_of(used) == CITY
    assert names(used.shown) == ["time", "weather"]


def test_a_named_tool_without_parameters_takes_an_object():
    assert is_valid(use(TIME, choice=ToolChoice(Mode.REQUIRED, named="time")), {})


def test_references_in_parameters_still_lead_where_they_led():
    used = use(WEATHER, TREE, choice=ToolChoice(Mode.REQUIRED))
    plant = {"root": {"size": 1}, "again": {"root": {"size": 2}}}
    assert is_valid(used, [{"name": "plant", "parameters": plant}])
    assert not is_valid(used, [{"name": "plant", "parameters": {"root": {"size": "x"}}}])
    assert not is_valid(used, [{"name": "plant", "parameters": {"root": {"size": 1}, "again": {}}}])


def test_of_allowed_tools_only_those_are_shown_where_nothing_else_keeps_the_others_away():
    used = use(WEATHER, TIME, choice=ToolChoice(Mode.AUTO, frozenset({"time"})))
    assert names(used.shown) == ["time"] == names(json.loads(used.parsing.tools))


def test_of_allowed_and_required_tools_all_are_shown_and_those_may_be_called():
    used = use(WEATHER, TIME, choice=ToolChoice(Mode.REQUIRED, frozenset({"time"})))
    assert names(used.shown) == ["weather", "time"]
    assert is_valid(used, [{"name": "time", "parameters": {}}])
    assert not is_valid(used, [{"name": "weather", "parameters": {"city": "Rome"}}])


def test_no_allowed_tool_is_no_tool():
    assert use(WEATHER, choice=ToolChoice(Mode.AUTO, frozenset())) == NO_TOOLS


@pytest.mark.parametrize(
    "choice",
    [
        ToolChoice(Mode.REQUIRED, named="tide"),
        ToolChoice(Mode.AUTO, frozenset({"tide"})),
        ToolChoice(Mode.REQUIRED, frozenset()),
    ],
)
def test_a_choice_of_nothing_that_is_there_is_refused(choice):
    with pytest.raises(InvalidRequest) as caught:
        use(WEATHER, choice=choice)
    assert caught.value.param == "tool_choice"


def test_required_without_tools_is_refused():
    with pytest.raises(InvalidRequest, match="must be called"):
        use(choice=ToolChoice(Mode.REQUIRED))


def test_a_custom_tool_is_a_function_of_one_text_and_named_as_custom():
    tool = custom_tool("patch", "Change files.", None, param="tools[0].custom")
    used = use(WEATHER, tool, choice=ToolChoice(Mode.REQUIRED))
    assert used.parsing.custom == ["patch"]
    assert is_valid(used, [{"name": "patch", "parameters": {"input": "free text"}}])
    assert not is_valid(used, [{"name": "patch", "parameters": {"input": 3}}])
    assert not is_valid(used, [{"name": "patch", "parameters": {}}])


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_grammar_is_told_to_the_model_and_a_regular_expression_binds_too(is_wrapped):
    regex = {"syntax": "regex", "definition": "^a+$"}
    lark = {"syntax": "lark", "definition": "start: /a+/"}
    wrap = (
        (lambda grammar: {"type": "grammar", "grammar": grammar})
        if is_wrapped
        else (lambda g: {"type": "grammar", **g})
    )
    tool = custom_tool("count", None, wrap(regex), param="p")
    assert "^a+$" in tool.description
    used = use(tool, choice=ToolChoice(Mode.REQUIRED, named="count"))
    assert is_valid(used, {"input": "aaa"})
    assert not is_valid(used, {"input": "b"})
    assert custom_tool("count", "Counts.", wrap(lark), param="p").description.startswith("Counts.\n\n")


@pytest.mark.parametrize(
    "format_",
    [
        {"type": "image"},
        {"type": "grammar"},
        {"type": "grammar", "grammar": {"syntax": "x"}},
        {"type": "grammar", "grammar": "x"},
        {"type": "grammar", "grammar": None},
    ],
)
def test_an_unknown_format_of_a_custom_tool_is_refused_by_name(format_):
    with pytest.raises(InvalidRequest) as caught:
        custom_tool("t", None, format_, param="tools[2].custom")
    assert caught.value.param.startswith("tools[2].custom.format")


def test_there_is_a_limit_of_tools_and_of_a_names_length():
    with pytest.raises(InvalidRequest, match="limit is 1"):
        use(WEATHER, TIME, limits=Limits(num_tools=1))
    for name in ("", "x" * 300):
        with pytest.raises(InvalidRequest, match="1 to 256"):
            use(Tool(name))


def test_parameters_nested_beyond_what_can_be_searched_are_refused():
    deep: dict = {"type": "object"}
    for _ in range(3000):
        deep = {"properties": {"a": deep}}
    with pytest.raises(InvalidRequest, match="too deeply"):
        use(Tool("t", parameters=deep), choice=ToolChoice(Mode.REQUIRED))


@pytest.mark.parametrize("choice", [ToolChoice(Mode.REQUIRED), ToolChoice(named="weather")])
def test_calls_that_must_be_made_have_the_limit_of_every_schema(choice):
    schema = use(WEATHER, TIME, choice=choice).structured.json_schema
    use(WEATHER, TIME, choice=choice, limits=Limits(schema_bytes=len(schema)))
    with pytest.raises(InvalidRequest, match=f"the limit is {len(schema) - 1}") as refused:
        use(WEATHER, TIME, choice=choice, limits=Limits(schema_bytes=len(schema) - 1))
    assert refused.value.param == "tools"
    use(WEATHER, TIME, limits=Limits(schema_bytes=1))
