"""vLLM's own parsers of tool calls and thoughts (`vllm.parser`), by the names that its server takes."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import get_tokenizer
from vllm.tool_parsers import ToolParserManager

from planes.wire.errors import UNSUPPORTED, InvalidRequest, UnusableSetting
from planes.wire.frames import Parsing
from workers.answer.detokenizer import Vocabulary
from workers.answer.markup import reader_of
from workers.answer.parts import AnswerParser, CallArguments, CallStart, Content, Part, Reasoning
from workers.parsers import VLLM_NAMES, ParserNames

_log = structlog.get_logger()


class VllmParsers:
    """One pair of parsers, for a model in a directory."""

    def __init__(self, names: ParserNames, model: Path) -> None:
        """Raises:  UnusableSetting for a name that this vLLM does not know, or that does not fit the tokenizer."""
        tool = VLLM_NAMES.get(names.tool, names.tool)
        reasoning = VLLM_NAMES.get(names.reasoning, names.reasoning)
        _check("tool_parser", tool, ToolParserManager.list_registered())
        _check("reasoning_parser", reasoning, ReasoningParserManager.list_registered())
        self._tokenizer = get_tokenizer(str(model))
        try:
            self._parser = ParserManager.get_parser(
                tool_parser_name=tool or None,
                reasoning_parser_name=reasoning or None,
                enable_auto_tools=bool(tool),
                tokenizer=self._tokenizer,
            )
        except TypeError as exc:
            raise UnusableSetting("tool_parser", tool or reasoning, f"it does not fit this model: {exc}") from exc

    def spelling(self, vocabulary: Vocabulary) -> Vocabulary:
        """Many of them look for special tokens in the text."""
        return vocabulary.spelling_all()

    def maker(self, parsing: Parsing, prompt: npt.NDArray[np.uint32]) -> Callable[[], AnswerParser]:
        if self._parser is None:
            raise RuntimeError("there is no parser to make")
        kwargs = msgspec.json.decode(parsing.template_kwargs or b"{}")
        return lambda: VllmParser(partial(self._made, kwargs), parsing, prompt.tolist())

    def _made(self, kwargs: dict[str, Any], tools: list[Any] | None) -> Any:
        """vLLM's own.  Raises:  InvalidRequest, which must stay one: vLLM's engine process, which makes the reasoning
        parser of a request with a grammar, would not survive it.
        """
        try:
            return self._parser(self._tokenizer, tools, chat_template_kwargs=kwargs)
        except Exception as exc:  # of some model's maker; most are made of nothing else
            param, code = ("chat_template_kwargs", UNSUPPORTED) if kwargs else (None, None)
            message = f"this model's parser will not read the answer: {exc}"
            raise InvalidRequest(message, param=param, code=code) from exc


class VllmParser:
    """One choice. Where a parser fails, what follows is text of the answer."""

    def __init__(self, make: Callable[[list[Any] | None], Any], parsing: Parsing, prompt: list[int]) -> None:
        self._request = _request(parsing)
        self._parser = make(self._request.tools)
        self._prompt = prompt
        self.reasoning_tokens = 0
        self._num_untold = 0
        """Tokens that nothing has been told of yet; they count as what is told next."""
        self._is_parallel = parsing.is_parallel
        self._names: dict[int, str] = {}
        """Of the calls that have been told, by vLLM's index."""
        self._forced = reader_of(parsing) if parsing.tool_choice not in ("auto", "none") else None
        """What the answer's constraint makes it look like, which is the same for all models."""
        self._has_failed = False

    def advance(self, text: str, token: int) -> Sequence[Part]:
        self._num_untold += 1
        return self._counted(self._read(text, [token], is_finished=False))

    def finish(self, text: str) -> Sequence[Part]:
        parts = self._counted(self._read(text, [], is_finished=True))
        return parts if self._forced is None else [*parts, *self._forced.finish()]

    def _counted(self, parts: list[Part]) -> list[Part]:
        """vLLM's own count looks at all tokens, and misses thoughts that the prompt has opened."""
        if parts:
            if any(isinstance(part, Reasoning) for part in parts):
                self.reasoning_tokens += self._num_untold
            self._num_untold = 0
        return parts

    def _read(self, text: str, tokens: list[int], *, is_finished: bool) -> list[Part]:
        if self._has_failed:
            return [Content(text)] if text else []
        try:
            delta = self._parser.parse_delta(text, tokens, self._request, self._prompt, finished=is_finished)
        except Exception as exc:  # noqa: BLE001 - of some model's maker, about text that a model wrote
            _log.warning(
                "answer.parser_failed", parser=type(self._parser).__name__, reason=f"{type(exc).__name__}: {exc}"
            )
            self._has_failed = True
            return [Content(text)] if text else []
        return [] if delta is None else self._parts(delta)

    def _parts(self, delta: Any) -> list[Part]:
        parts: list[Part] = [Reasoning(delta.reasoning)] if delta.reasoning else []
        if delta.content:
            parts += [Content(delta.content)] if self._forced is None else self._forced.advance(delta.content)
        for call in delta.tool_calls or ():
            parts += self._call(call)
        return parts

    def _call(self, call: Any) -> list[Part]:
        parts: list[Part] = []
        function = call.function
        if function is None:
            return parts
        if function.name and call.index not in self._names:
            self._names[call.index] = function.name
            parts.append(CallStart(len(self._names) - 1, function.name))
        if call.index not in self._names:
            return parts
        place = list(self._names).index(call.index)
        if function.arguments:
            parts.append(CallArguments(place, function.arguments))
        return parts if place == 0 or self._is_parallel else []


def _request(parsing: Parsing) -> ChatCompletionRequest:
    """What parsers look at. A forced answer is read by ours, so that theirs see plain text."""
    tools = msgspec.json.decode(parsing.tools) if parsing.tools else None
    is_auto = bool(tools) and parsing.tool_choice == "auto"
    return ChatCompletionRequest(
        messages=[{"role": "user", "content": ""}],
        tools=tools,
        tool_choice="auto" if is_auto else "none",
        parallel_tool_calls=parsing.is_parallel,
        include_reasoning=True,
    )


def _check(flag: str, name: str, known: Sequence[str]) -> None:
    if name and name not in known:
        raise UnusableSetting(flag, name, f"this vLLM has {', '.join(sorted(known))}; or auto, none")
