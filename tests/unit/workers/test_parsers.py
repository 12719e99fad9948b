from pathlib import Path

import numpy as np
import pytest

from planes.wire.errors import UnusableSetting
from planes.wire.frames import Parsing
from workers.answer.detokenizer import load_vocabulary
from workers.answer.parts import Content, Reasoning
from workers.parsers import ParserNames, make_parsers, parser_names

SIM = Path("workers/sim/model")
VOCABULARY = load_vocabulary(SIM / "tokenizer.json")


@pytest.mark.parametrize(
    ("tool", "reasoning", "template", "expected"),
    [
        ("auto", "auto", "", ParserNames("", "")),
        ("auto", "auto", "… <tool_call> …", ParserNames("tags", "")),
        ("auto", "auto", "<tool_call><function=a>", ParserNames("", "")),  # another family's calls
        ("auto", "auto", "<think>…</think>", ParserNames("", "think")),
        ("none", "none", "<tool_call></think>", ParserNames("", "")),
        ("mistral", "think", "", ParserNames("mistral", "think")),
    ],
)
def test_flags_and_template_name_the_parsers(tool, reasoning, template, expected):
    assert parser_names(tool, reasoning, template) == expected


@pytest.mark.parametrize(
    ("tool", "reasoning", "fields", "expected"),
    [
        ("auto", "auto", {"thinking", "content", "tool_calls"}, ParserNames("hf", "hf")),
        ("auto", "auto", {"content", "tool_calls"}, ParserNames("hf", "")),
        ("none", "auto", {"thinking", "tool_calls"}, ParserNames("", "hf")),
        ("hf", "auto", {"thinking", "tool_calls"}, ParserNames("hf", "hf")),
        ("hermes", "auto", {"thinking", "tool_calls"}, ParserNames("hermes", "think")),  # it goes with no other
        ("auto", "think", {"thinking", "tool_calls"}, ParserNames("tags", "think")),
        ("auto", "auto", None, ParserNames("tags", "think")),
    ],
)
def test_what_the_checkpoint_says_of_its_responses_comes_before_its_chat_template(tool, reasoning, fields, expected):
    assert parser_names(tool, reasoning, "<tool_call> </think>", fields) == expected


@pytest.mark.parametrize(("names", "flag"), [(("mistral", ""), "tool-parser"), (("tags", "qwen3"), "reasoning-parser")])
def test_the_simulated_engine_has_our_parsers_alone(names, flag):
    with pytest.raises(UnusableSetting, match=flag):
        make_parsers(ParserNames(*names), VOCABULARY, SIM, engine="sim")


@pytest.mark.parametrize(("end", "part"), [("…<think>\n", Reasoning("a")), ("…", Content("a"))])
def test_a_prompt_may_have_opened_the_thoughts(end, part):
    parsers = make_parsers(ParserNames("", "think"), VOCABULARY, SIM, engine="sim")
    prompt = np.frombuffer(end.encode(), dtype=np.uint8).astype(np.uint32)
    parser = parsers.maker(Parsing(has_reasoning=True), prompt)()
    assert [*parser.advance("a", 97), *parser.finish("")] == [part]
