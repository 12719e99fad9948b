"""vLLM's parsers behind our fold: however a text is cut into tokens, and wherever it is resumed, it reads the same."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from planes.wire.errors import UNSUPPORTED, InvalidRequest
from planes.wire.frames import FinishReason, Format, Parsing, Sampling, Usage
from workers.answer.detokenizer import load_vocabulary
from workers.answer.formatter import Formatter
from workers.answer.parts import CallArguments, CallStart, Content, Reasoning, merged
from workers.engine.base import EngineOutput
from workers.parsers import ParserNames, make_parsers
from workers.settings import SIM_MODEL

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(2400),
    pytest.mark.filterwarnings("ignore"),
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
        },
    }
]
PARSING = Parsing(tools=json.dumps(TOOLS).encode(), has_reasoning=True)
PROMPT = np.arange(65, 75, dtype=np.uint32)

FAMILIES = [
    ("hermes", "", 'Look. <tool_call>\n{"name": "weather", "arguments": {"at": "sea"}}\n</tool_call>'),
    ("llama3_json", "", '{"name": "weather", "parameters": {"at": "sea"}}'),
    ("pythonic", "", '[weather(at="sea")]'),
    (
        "qwen3_coder",
        "",
        "<tool_call>\n<function=weather>\n<parameter=at>\nsea\n</parameter>\n</function>\n</tool_call>",
    ),
    ("granite", "", '<|tool_call|>[{"name": "weather", "arguments": {"at": "sea"}}]'),
    ("tags", "deepseek_r1", '<think>hm</think><tool_call>{"name": "weather", "arguments": {"at": "sea"}}</tool_call>'),
    ("hf", "hf", '<think>hm</think><tool_call>{"name": "weather", "arguments": {"at": "sea"}}</tool_call>'),
]
RESPONSES = {
    "start_anchor": "J",  # the prompt's end
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "transform": {"function": {"name": "{content.name}", "arguments": "{content.arguments}"}},
        },
    },
}
"""What answers look like, as a checkpoint says it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The simulated model's bytes for tokens, and the special tokens that some families look for."""
    folder = tmp_path_factory.mktemp("model")
    spec = json.loads((SIM_MODEL / "tokenizer.json").read_text())
    words = ("<|python_tag|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]")
    for word in (*words, "<ifm|think>", "</ifm|think>"):
        added = dict(spec["added_tokens"][0], id=256 + len(spec["added_tokens"]), content=word)
        spec["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((SIM_MODEL / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"response_template": RESPONSES}))
    return folder


@pytest.fixture(scope="module")
def vocabulary(model):
    return load_vocabulary(model / "tokenizer.json")


def tokens_of(model, text):
    return Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def parts_of(parsers, text, vocabulary, model, parsing=PARSING):
    parser = parsers.maker(parsing, PROMPT)()
    names = parsers.spelling(vocabulary).texts
    parts = [part for token in tokens_of(model, text) for part in parser.advance(names[token].decode(), token)]
    return merged([*parts, *parser.finish("")])


@pytest.mark.parametrize(("tool", "reasoning", "text"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_a_family_s_call_is_found_and_resumed_at_any_token(tool, reasoning, text, vocabulary, model):
    parsers = make_parsers(ParserNames(tool, reasoning), vocabulary, model, engine="vllm")
    parts = parts_of(parsers, text, vocabulary, model)
    (start,) = [part for part in parts if isinstance(part, CallStart)]
    arguments = "".join(part.text for part in parts if isinstance(part, CallArguments))
    assert (start.name, json.loads(arguments)) == ("weather", {"at": "sea"})
    assert any(isinstance(part, Reasoning) for part in parts) == bool(reasoning)

    def formatter():
        layout = Format("chat", "id-1", "m", 7, is_streaming=True, parsing=PARSING)
        maker = parsers.maker(PARSING, PROMPT)
        return Formatter(layout, Sampling(max_tokens=999), parsers.spelling(vocabulary), parser=maker)

    tokens = tokens_of(model, text)
    whole = formatter()
    events = [whole.feed(EngineOutput(0, (token,)))[0] for token in tokens]
    last = whole.end(FinishReason.STOP) + whole.finish(Usage(1, 1, 0))
    for place in range(0, len(tokens), 7):
        resumed = formatter()
        resumed.fold(tokens[:place])
        rest = [resumed.feed(EngineOutput(0, (token,)))[0] for token in tokens[place:]]
        assert rest == events[place:]
        assert resumed.end(FinishReason.STOP) + resumed.finish(Usage(1, 1, 0)) == last


def test_a_forced_call_reads_the_same_with_every_family(vocabulary, model):
    parsers = make_parsers(ParserNames("llama3_json", ""), vocabulary, model, engine="vllm")
    named = Parsing(tools=PARSING.tools, tool_choice="function:weather")
    assert parts_of(parsers, '{"at": "sea"}', vocabulary, model, named) == [
        CallStart(0, "weather"),
        CallArguments(0, '{"at": "sea"}'),
    ]
    required = Parsing(tools=PARSING.tools, tool_choice="required")
    listed = '[{"name": "weather", "parameters": {"at": "sea"}}]'
    assert parts_of(parsers, listed, vocabulary, model, required) == [
        CallStart(0, "weather"),
        CallArguments(0, '{"at": "sea"}'),
    ]


def test_an_unknown_name_is_refused_with_those_that_are_known(vocabulary, model):
    with pytest.raises(Exception, match=r"--tool-parser .*hermes"):
        make_parsers(ParserNames("mill", ""), vocabulary, model, engine="vllm")


@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3", "minimax_m2"])
@pytest.mark.parametrize("text", ["<think>hm, é ß</think>\n\né", "no, é</think>x", "<think>cut öf", "<think>a</think>"])
def test_thoughts_are_counted_as_they_are_told(name, text, vocabulary, model):
    """Wherever the answer is cut: nothing but the tokens that make up a thought, its opening tag with them."""
    parsers = make_parsers(ParserNames("", name), vocabulary, model, engine="vllm")
    parsing = Parsing(has_reasoning=True)
    tokens, prompt = tokens_of(model, text), np.array(tokens_of(model, "Why?<think>"), np.uint32)
    spelling = parsers.spelling(vocabulary)
    whole = parsers.maker(parsing, prompt)()
    whole._parser.count_reasoning_tokens = None  # type: ignore[attr-defined]  # it looks at every token each time
    detokenizer = spelling.detokenizer([])
    for place, token in enumerate(tokens, 1):
        parts = whole.advance(detokenizer.advance(token), token)
        if any(isinstance(part, Reasoning) for part in parts):
            assert whole.reasoning_tokens == place
    end = tokens_of(model, "</think>")
    thought = tokens[: tokens.index(end[0])] if end[0] in tokens else tokens
    assert whole.reasoning_tokens == len(thought)


@pytest.mark.parametrize("effort", ["minimal", ["high"]])
def test_a_request_that_its_parser_will_not_have_is_refused_with_the_parser_s_reason(effort, model, vocabulary):
    """Read as plain text, with a grammar, it would be the end of vLLM's engine process, which makes the parser, too."""
    parsers = make_parsers(ParserNames("", "k2_horizon"), vocabulary, model, engine="vllm")
    kwargs = json.dumps({"reasoning_effort": effort}).encode()
    make = parsers.maker(Parsing(has_reasoning=True, template_kwargs=kwargs), PROMPT)
    with pytest.raises(InvalidRequest, match=r"Unsupported reasoning_effort .* high, medium, low") as refused:
        make()
    assert refused.value.code == UNSUPPORTED


def test_a_parser_that_fails_loses_no_answer(vocabulary, model, monkeypatch):
    parsers = make_parsers(ParserNames("hermes", ""), vocabulary, model, engine="vllm")
    parser: Any = parsers.maker(PARSING, PROMPT)()
    hermes = parser._parser

    def fail(*_args, **_kwargs):
        raise KeyError("x")

    told = [*parser.advance("a", 97)]
    monkeypatch.setattr(hermes, "parse_delta", fail)
    told += [*parser.advance("b", 98), *parser.advance("c", 99), *parser.finish("")]
    assert merged(told) == [Content("abc")]
