import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseItem

from app.openai.responses.bodies import Item
from app.openai.responses.items import known_items, listed_items, parse_input, template_messages
from app.openai.schema import Limits
from planes.wire.errors import InvalidRequest
from tests.openai_types import checked


def parsed(value):
    return parse_input(msgspec.Raw(msgspec.json.encode(value)), Limits())


def messages(value, instructions=None):
    return list(template_messages(parsed(value).items, instructions))


CONVERSATION = [
    {"role": "developer", "content": "Use metres."},
    {"role": "user", "content": [{"type": "input_text", "text": "How wide is it?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "I must look."}]},
    {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Looking.", "annotations": []}],
    },
    {"type": "function_call", "call_id": "c1", "name": "width", "arguments": '{"of": "mill"}'},
    {"type": "custom_tool_call", "call_id": "c2", "name": "shell", "input": "ls"},
    {"type": "function_call_output", "call_id": "c1", "output": "12"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "mill.txt"}]},
    {"role": "user", "content": "Thanks."},
]


def test_a_text_is_a_users_message():
    assert messages("Hi") == [{"role": "user", "content": "Hi"}]


def test_items_become_the_turns_that_templates_know():
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "width", "arguments": {"of": "mill"}}},
        {"id": "c2", "type": "function", "function": {"name": "shell", "arguments": {"input": "ls"}}},
    ]
    assert messages(CONVERSATION, "Be brief.") == [
        {"role": "system", "content": "Be brief.\n\nUse metres."},
        {"role": "user", "content": "How wide is it?"},
        {
            "role": "assistant",
            "content": "Looking.",
            "reasoning": "I must look.",
            "reasoning_content": "I must look.",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "c1", "content": "12", "name": "width"},
        {"role": "tool", "tool_call_id": "c2", "content": "mill.txt", "name": "shell"},
        {"role": "user", "content": "Thanks."},
    ]


def test_thoughts_after_a_call_begin_a_new_turn():
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    assert [list(message) for message in messages([call, thought, call])] == [
        ["role", "content", "tool_calls"],
        ["role", "content", "reasoning", "reasoning_content", "tool_calls"],
    ]


def test_what_a_model_said_is_taken_back_whatever_it_is():
    said = [
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"cut off'},
        {"type": "function_call_output", "call_id": "c0", "output": {"any": "JSON"}},
        {"type": "message", "role": "assistant", "content": []},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"},
    ]
    call, output, refusal = messages(said)
    assert call["tool_calls"][0]["function"]["arguments"] == '{"cut off'
    assert output["content"] == '{"any":"JSON"}'
    assert refusal["content"] == "No."


def test_items_of_tools_that_run_elsewhere_are_left_out_and_named():
    value = [{"type": "web_search_call", "id": "ws_1", "status": "completed"}, {"role": "user", "content": "Hi"}]
    assert parsed(value).ignored == ("input[0] (web_search_call)",)
    assert messages(value) == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "input[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}, "input[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "robot", "content": "x"}, "input[0].role"),
        ({"type": "function_call_output", "output": [{"type": "input_image"}]}, "input[0].output[0].type"),
        ({"type": "compaction", "encrypted_content": "x"}, "input[0]"),
        ({"type": "computer_call_output", "output": {}}, "input[0]"),
        ({}, "input[0]"),
        (5, "input[0]"),
    ],
)
def test_what_cannot_be_answered_to_is_refused_by_name(item, param):
    with pytest.raises(InvalidRequest) as refused:
        parsed([item])
    assert refused.value.param == param


@pytest.mark.parametrize("value", [5, {}, None, [5], ["x"]])
def test_what_is_no_input_is_refused(value):
    with pytest.raises(InvalidRequest) as refused:
        parsed(value)
    assert refused.value.param.startswith("input")


def test_listed_items_are_of_openais_types_and_each_has_an_id():
    raw = parsed(CONVERSATION).raw
    listed = listed_items("resp_0123", raw)
    for item in listed:
        checked(ResponseItem, item)
    ids = [item["id"] for item in listed]
    assert len(set(ids)) == len(ids)
    assert ids[2] == "rs_1"


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ({}, []),
        ({"content": None}, []),
        ({"content": ""}, [""]),
        ({"content": [{"type": "output_audio", "audio": "x"}]}, [""]),
    ],
)
def test_what_a_model_said_is_listed_also_without_a_text(content, texts):
    (item,) = listed_items("resp_0", parsed([{"role": "assistant", **content}]).raw)
    assert [part["text"] for part in item["content"]] == texts
    checked(ResponseItem, item)


class Piece(str):
    """Refuses to be copied into what is longer by one piece."""

    __slots__ = ()

    def __add__(self, other):
        raise AssertionError("all pieces before are copied once for each that follows")

    __radd__ = __add__


@pytest.mark.parametrize(
    ("item", "fields", "between"),
    [
        (Item("reasoning"), ["reasoning", "reasoning_content"], ""),
        (Item(role="system"), ["content"], "\n\n"),
        (Item(role="developer"), ["content"], "\n\n"),
    ],
)
def test_thoughts_and_instructions_in_many_pieces_are_put_together_at_once(item, fields, between):
    pieces = [Piece(f"{number}.") for number in range(5)]
    (message,) = template_messages([msgspec.structs.replace(item, content=piece) for piece in pieces], None)
    assert [message[field] for field in fields] == [between.join(pieces)] * len(fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "output", "text", "id", "arguments"]), inner)
    ),
    max_leaves=10,
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["output_text", "refusal", "x"])}), max_size=2)
CONTENT = {"content": JSON | PARTS, "output": JSON | PARTS, "role": st.sampled_from(["user", "assistant"]) | JSON}
TYPES = st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "custom_tool_call", "x"])


@given(st.lists(st.fixed_dictionaries({"type": TYPES}, optional=CONTENT)))
def test_whatever_is_accepted_can_be_shown_to_a_template_and_listed(items):
    try:
        found = parsed(items)
    except InvalidRequest:
        return
    for message in template_messages(found.items, None):
        assert isinstance(message["content"], str)
    assert known_items(b"[" + b",".join(found.raw) + b"]") == found.items
    assert len(listed_items("resp_0", found.raw)) == len(found.items)
