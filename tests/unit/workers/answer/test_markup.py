import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.frames import Parsing
from workers.answer.markup import MarkupParser
from workers.answer.parts import CallArguments, CallStart, Content, Reasoning, merged

TOOLS = b'[{"type":"function","function":{"name":"weather"}}]'
AUTO = Parsing(tools=TOOLS, has_reasoning=True)


def read(text, parsing=AUTO, *, cuts=(), is_thinking=False):
    """The parts of a text that comes in pieces, cut at these places."""
    parser = MarkupParser(parsing, is_thinking=is_thinking)
    places = [0, *sorted(cuts), len(text)]
    parts = []
    for start, end in itertools.pairwise(places):
        parts += parser.advance(text[start:end], 0)
    return merged([*parts, *parser.finish("")])


def call(name="weather", arguments='{"at": "sea"}', index=0):
    return [CallStart(index, name), CallArguments(index, arguments)]


TAGGED = '<tool_call>\n{"name": "weather", "arguments": {"at": "sea"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hello there.", [Content("Hello there.")]),
        (" Hello \n", [Content(" Hello \n")]),
        (TAGGED, call()),
        (f"I look.\n{TAGGED}", [Content("I look."), *call()]),
        (f"{TAGGED}\n{TAGGED}\n", [*call(), *call(index=1)]),
        (f"{TAGGED}\n\nDone.", [*call(), Content("Done.")]),
        (f"<think>\nhm\n</think>\n\n{TAGGED}", [Reasoning("hm"), *call()]),
        ("<think>hm", [Reasoning("hm")]),
        ("a <think>b</think>", [Content("a <think>b</think>")]),
        ("a < b <tool_ c", [Content("a < b <tool_ c")]),
        ("a <tool_call", [Content("a <tool_call")]),
        ("<tool_call>\nno call</tool_call>", [Content("<tool_call>\nno call</tool_call>")]),
        ("<tool_call>{bad}</tool_call> x", [Content("<tool_call>{bad}</tool_call> x")]),
        ('<tool_call>{"name": "weather", "arg', [Content('<tool_call>{"name": "weather", "arg')]),
        ('<tool_call>{"name": "weather", "arguments": {"a": 1', call(arguments='{"a": 1')),
        ('<tool_call>{"arguments": {"a":1}, "name": "weather"}</tool_call>', call(arguments='{"a":1}')),
        ('<tool_call>{"name": "weather", "arguments": "{\\"a\\":1}"}</tool_call>', call(arguments='{"a":1}')),
        ('<tool_call>{"name": "weather"}</tool_call>', call(arguments="{}")),
        (
            '<tool_call>{"name": "weather", "parameters": {}, "id": 7}</tool_call>.',
            [*call(arguments="{}"), Content(".")],
        ),
        (f"{TAGGED[:-12]}{TAGGED}", [*call(), *call(index=1)]),
        (
            '<tool_call>{"name": "weather", "arguments": {"at": "</tool_call>}"}}</tool_call>',
            call(arguments='{"at": "</tool_call>}"}'),
        ),
        ('<tool_call>{"name": "w\\u00e9", "arguments": {}}</tool_call>', call("wé", "{}")),
        (f"{TAGGED[:-6]}", call()),
        (f"{TAGGED[:-12]}<tool_", call()),
        (f"{TAGGED}\n<tool_call>{{bad}} x", [*call(), Content("<tool_call>{bad} x")]),
    ],
)
def test_texts_and_their_parts(text, parts):
    assert read(text) == parts


def test_tags_in_the_arguments_of_a_call_are_theirs_wherever_a_token_ends():
    text = '<tool_call> {"name": "weather", "arguments": {"at": "<tool_call> <tool_call>{</tool_call>"}}</tool_call>'
    for cut in range(len(text)):
        assert read(text, cuts=[cut]) == call(arguments='{"at": "<tool_call> <tool_call>{</tool_call>"}')


def test_thoughts_that_the_prompt_has_opened():
    assert read("hm\n</think>\nYes.", is_thinking=True) == [Reasoning("hm"), Content("Yes.")]


def test_a_single_call_is_all_that_is_told_where_one_was_asked_for():
    parsing = Parsing(tools=TOOLS, is_parallel=False)
    assert read(TAGGED + TAGGED, parsing) == call()


LISTED = '[{"name": "weather", "parameters": {"at": "sea"}}, {"name": "weather", "parameters": {}}]'


def test_a_forced_answer_is_a_list_of_calls():
    parsing = Parsing(tools=TOOLS, tool_choice="required")
    assert read(LISTED, parsing) == [*call(), *call(arguments="{}", index=1)]
    assert read(LISTED, Parsing(tools=TOOLS, tool_choice="required", is_parallel=False)) == call()
    assert read(LISTED[:20], parsing) == [Content('{"name": "weather",')]


def test_an_answer_forced_to_one_tool_is_its_arguments():
    parsing = Parsing(tools=TOOLS, tool_choice="function:weather", has_reasoning=True)
    assert read('{"at": "sea"}', parsing) == call()
    assert read('<think>hm</think>\n\n{"at": "sea"}', parsing) == [Reasoning("hm"), *call()]
    assert read("", parsing) == []


def test_tokens_of_thoughts_are_counted():
    parser = MarkupParser(AUTO)
    for piece in ("<think>", "a", "b", "</think>", "Yes", "."):
        parser.advance(piece, 0)
    assert parser.reasoning_tokens == 4


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", TAGGED]
PIECES = [
    "<think>hm\n",
    "\n</think>\n\n",
    '<tool_call>{"name": "weather", "arguments": {"at": "<tool_call> ',
    '{"name": "weather", ',
    '"arguments": ',
    '{"at": "sea"}',
    "{",
    "}",
    '"',
    "\\",
    "\n",
    " ",
    "a",
    "é",
    "[",
    "]",
    ",",
]
WORDS = st.sampled_from([*TAGS, *PIECES])


@given(words=st.lists(WORDS, max_size=14), data=st.data(), choice=st.sampled_from(["auto", "required", "function:f"]))
def test_it_does_not_matter_how_a_text_is_cut(words, data, choice):
    text = "".join(words)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    parsing = Parsing(tools=TOOLS, tool_choice=choice, has_reasoning=True)
    assert read(text, parsing, cuts=cuts) == read(text, parsing)


@given(words=st.lists(WORDS, max_size=14))
def test_only_tags_blanks_and_calls_are_left_out_of_the_text(words):
    text = "".join(words)
    parts = read(text, Parsing(tools=TOOLS))
    if not any(isinstance(part, CallStart) for part in parts):
        assert "".join(part.text for part in parts).split() == text.split()
    for start in (part for part in parts if isinstance(part, CallStart)):
        arguments = "".join(p.text for p in parts if isinstance(p, CallArguments) and p.index == start.index)
        assert arguments in text or json.loads(arguments) is not None
