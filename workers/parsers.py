"""Which parser reads an answer's tool calls and thoughts: ours for the commonest markup, vLLM's for all others.

| flag                        | value  | what it reads                                                       |
|-----------------------------|--------|---------------------------------------------------------------------|
| `--tool-parser`             | tags   | `<tool_call>{…}</tool_call>` (`workers/answer/markup.py`)           |
| `--reasoning-parser`        | think  | `<think>…</think>` at the beginning (the same)                      |
| both                        | none   | nothing                                                             |
| both                        | auto   | what the checkpoint's `response_template` says, by vLLM's parser    |
|                             |        | `hf`; without one what its chat template speaks of; else none       |
| both                        | a name | one of vLLM's, such as `qwen3_coder`; with `--engine vllm`          |
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from planes.wire.errors import UnusableSetting
from planes.wire.frames import Parsing
from workers.answer.detokenizer import Vocabulary
from workers.answer.markup import TAGS, MarkupParser
from workers.answer.parts import AnswerParser

OWN_TOOLS: Final = "tags"
OWN_REASONING: Final = "think"
AUTO: Final = "auto"
NONE: Final = "none"
TEMPLATED: Final = "hf"
"""vLLM's, which reads as the checkpoint's `response_template` says; it goes with no other."""
VLLM_NAMES: Final = {OWN_TOOLS: "hermes", OWN_REASONING: "deepseek_r1"}
"""What vLLM calls ours."""
_OTHER_CALLS: Final = ("<function=", "<arg_key>", "<parameter=")
"""Markup of other families between the same tags."""

_PROMPT_END: Final = 8
"""Tokens at a prompt's end that may open the thoughts."""


class Parsers(Protocol):
    """Makes the parsers of a worker's answers."""

    def spelling(self, vocabulary: Vocabulary) -> Vocabulary:
        """The vocabulary whose texts have the special tokens that the parsers look for."""

    def maker(self, parsing: Parsing, prompt: npt.NDArray[np.uint32]) -> Callable[[], AnswerParser]:
        """A parser for each choice.  prompt: its tokens, shape (n,)."""


@dataclass(frozen=True, slots=True)
class ParserNames:
    """Of the two parsers; an empty one stands for none."""

    tool: str = ""
    reasoning: str = ""

    @property
    def are_own(self) -> bool:
        return self.tool in ("", OWN_TOOLS) and self.reasoning in ("", OWN_REASONING)


NO_PARSERS: Final = ParserNames()


def parser_names(
    tool: str, reasoning: str, chat_template: str, response_fields: Container[str] | None = None
) -> ParserNames:
    """What the flags come to for a model.

    Args:  chat_template: "" for none.  response_fields: which its `response_template` has; None: there is none, or
    nobody here can read by it.
    """
    if response_fields is not None and {tool, reasoning} <= {AUTO, NONE, TEMPLATED}:
        return ParserNames(
            tool=_resolved(tool, TEMPLATED if "tool_calls" in response_fields else ""),
            reasoning=_resolved(reasoning, TEMPLATED if "thinking" in response_fields else ""),
        )
    has_calls = "<tool_call>" in chat_template and not any(other in chat_template for other in _OTHER_CALLS)
    has_thoughts = "</think>" in chat_template
    return ParserNames(
        tool=_resolved(tool, OWN_TOOLS if has_calls else ""),
        reasoning=_resolved(reasoning, OWN_REASONING if has_thoughts else ""),
    )


def engine_reasoning(names: ParserNames, vocabulary: Vocabulary) -> str:
    """vLLM's name of the parser by which its engine knows where thoughts end; "" if that is no single token."""
    if names.reasoning != OWN_REASONING:
        return names.reasoning
    return VLLM_NAMES[OWN_REASONING] if TAGS[1].encode() in vocabulary.names else ""


def make_parsers(names: ParserNames, vocabulary: Vocabulary, model: Path, *, engine: str) -> Parsers:
    """Blocks: vLLM's need the model's tokenizer.  Raises:  UnusableSetting for a name that nobody knows."""
    if names.are_own:
        return MarkupParsers(vocabulary)
    if engine != "vllm":
        is_tool = names.tool not in ("", OWN_TOOLS)
        flag, name = ("tool_parser", names.tool) if is_tool else ("reasoning_parser", names.reasoning)
        own = OWN_TOOLS if is_tool else OWN_REASONING
        raise UnusableSetting(flag, name, f"with --engine {engine} it is {AUTO}, {NONE} or {own}")
    from workers.vllm.parsers import VllmParsers  # noqa: PLC0415 - heavy

    return VllmParsers(names, model)


class MarkupParsers:
    """Ours."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def spelling(self, vocabulary: Vocabulary) -> Vocabulary:
        return vocabulary.spelling(frozenset(tag.encode() for tag in TAGS))

    def maker(self, parsing: Parsing, prompt: npt.NDArray[np.uint32]) -> Callable[[], AnswerParser]:
        names = [self._vocabulary.names[token] for token in prompt[-_PROMPT_END:].tolist()]
        is_thinking = b"".join(names).rstrip().endswith(TAGS[0].encode())
        return lambda: MarkupParser(parsing, is_thinking=is_thinking)


def _resolved(flag: str, found: str) -> str:
    return {AUTO: found, NONE: ""}.get(flag, flag)
