"""OpenAI's chat completions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from planes.wire.frames import Format, Sampling, Usage
from workers.answer.custom_input import CustomInput
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Ending, FinishedChoice, TokenNote
from workers.answer.dialects.names import call_id
from workers.answer.dialects.openai import OpenAiDialect, encode, finish_reason, finite, usage_of
from workers.answer.parts import CallArguments, CallStart, Content, Part, Reasoning

_MORE = b',"logprobs":null,"finish_reason":null'


class ChatDialect(OpenAiDialect):
    """A chat completion, or its chunks."""

    has_prompt_in_choice = False

    def __init__(
        self, layout: Format, sampling: Sampling, vocabulary: Vocabulary, prompt: npt.NDArray[np.uint32]
    ) -> None:
        kind = "chat.completion.chunk" if layout.is_streaming else "chat.completion"
        super().__init__(layout, sampling, vocabulary, prompt, kind=kind)
        self._custom = frozenset(() if layout.parsing is None else layout.parsing.custom)
        self._inputs: dict[tuple[int, int], CustomInput] = {}
        """Of custom tools that are being called, by choice and call."""
        self._text_starts = [start + b'"delta":{"content":' for start in self._starts]
        self._text_end = b"}" + _MORE + self._end

    def opening(self, index: int) -> bytes:
        return self._starts[index] + b'"delta":{"role":"assistant","content":""}' + _MORE + self._end

    def text(self, index: int, text: str) -> bytes:
        return self._text_starts[index] + encode(text) + self._text_end

    def token(self, index: int, text: str, note: TokenNote) -> bytes:
        logprobs = b'},"logprobs":' + encode(self._logprobs([note])) + b',"finish_reason":null'
        return self._text_starts[index] + encode(text) + logprobs + self._end

    def part(self, index: int, part: Part) -> bytes:
        match part:
            case Content(text):
                return self.text(index, text)
            case Reasoning(text):
                return self._delta(index, {"reasoning_content": text, "reasoning": text})
            case CallStart(call, name):
                if name in self._custom:
                    self._inputs[index, call] = CustomInput()
                return self._call(index, {"index": call, **self._called(index, call, name, "")})
            case CallArguments(call, text):
                if (custom := self._inputs.get((index, call))) is None:
                    return self._call(index, {"index": call, "function": {"arguments": text}})
                return self._more_input(index, call, custom.advance(text))

    def closing(self, index: int, ending: Ending) -> bytes:
        inputs = [(call, custom.finish()) for (choice, call), custom in self._inputs.items() if choice == index]
        reason = b'"delta":{},"logprobs":null,"finish_reason":' + encode(finish_reason(ending))
        return b"".join([self._more_input(index, *left) for left in inputs]) + self._starts[index] + reason + self._end

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        written = [self._choice(choice) for choice in choices]
        answer = self._identity | {"choices": written, "usage": usage_of(usage)}
        if self._layout.has_token_ids:
            answer["prompt_token_ids"] = self._prompt.tolist()
        if choices[0].prompt_logprobs:
            answer["prompt_logprobs"] = self._ranked(choices[0].prompt_logprobs)
        return encode(answer)

    def _choice(self, choice: FinishedChoice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if thoughts := choice.reasoning:
            message |= {"reasoning_content": thoughts, "reasoning": thoughts}
        if calls := choice.calls():
            message["content"] = choice.text or None
            message["tool_calls"] = [
                self._called(choice.index, index, call.name, call.arguments) for index, call in enumerate(calls)
            ]
        logprobs = None if choice.notes is None else self._logprobs(choice.notes)
        reason = finish_reason(choice.ending)
        written = {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return written | {"token_ids": choice.tokens} if self._layout.has_token_ids else written

    def _delta(self, index: int, delta: dict[str, Any]) -> bytes:
        return self._starts[index] + b'"delta":' + encode(delta) + _MORE + self._end

    def _call(self, index: int, call: dict[str, Any]) -> bytes:
        return self._delta(index, {"tool_calls": [call]})

    def _more_input(self, index: int, call: int, text: str) -> bytes:
        return self._call(index, {"index": call, "custom": {"input": text}}) if text else b""

    def _called(self, index: int, call: int, name: str, arguments: str) -> dict[str, Any]:
        identifier = call_id(self._layout.response_id, index, call)
        if name not in self._custom:
            return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}
        custom = CustomInput()
        text = custom.advance(arguments) + custom.finish()
        return {"id": identifier, "type": "custom", "custom": {"name": name, "input": text}}

    def _logprobs(self, notes: Sequence[TokenNote]) -> dict[str, Any]:
        return {"content": [self._logprob(note) for note in notes], "refusal": None}

    def _logprob(self, note: TokenNote) -> dict[str, Any]:
        own = self._named(note.logprob.token, note.logprob.logprob)
        return {**own, "top_logprobs": [self._named(token, value) for token, value in note.logprob.top]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        name = list(self._vocabulary.names[token])
        return {"token": self._name(token), "logprob": finite(logprob), "bytes": name}
