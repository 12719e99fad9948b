"""OpenAI's chat completions."""

from collections.abc import Sequence
from typing import Any

from planes.wire.frames import Format, Usage
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Ending, FinishedChoice, TokenNote
from workers.answer.dialects.names import call_id
from workers.answer.dialects.openai import OpenAiDialect, encode, finish_reason, finite, usage_of
from workers.answer.parts import CallArguments, CallStart, Content, Part, Reasoning

_MORE = b',"logprobs":null,"finish_reason":null'


class ChatDialect(OpenAiDialect):
    """A chat completion, or its chunks."""

    def __init__(self, layout: Format, num_choices: int, vocabulary: Vocabulary) -> None:
        kind = "chat.completion.chunk" if layout.is_streaming else "chat.completion"
        super().__init__(layout, num_choices, vocabulary, kind=kind)
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
                function = {"name": name, "arguments": ""}
                return self._call(index, {"index": call, **self._identified(index, call), "function": function})
            case CallArguments(call, text):
                return self._call(index, {"index": call, "function": {"arguments": text}})

    def closing(self, index: int, ending: Ending) -> bytes:
        reason = b'"delta":{},"logprobs":null,"finish_reason":' + encode(finish_reason(ending))
        return self._starts[index] + reason + self._end

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        written = [self._choice(choice) for choice in choices]
        return encode(self._identity | {"choices": written, "usage": usage_of(usage)})

    def _choice(self, choice: FinishedChoice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if thoughts := choice.reasoning:
            message |= {"reasoning_content": thoughts, "reasoning": thoughts}
        if calls := choice.calls():
            message["content"] = choice.text or None
            message["tool_calls"] = [
                self._identified(choice.index, index) | {"function": {"name": call.name, "arguments": call.arguments}}
                for index, call in enumerate(calls)
            ]
        logprobs = None if choice.notes is None else self._logprobs(choice.notes)
        reason = finish_reason(choice.ending)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, index: int, delta: dict[str, Any]) -> bytes:
        return self._starts[index] + b'"delta":' + encode(delta) + _MORE + self._end

    def _call(self, index: int, call: dict[str, Any]) -> bytes:
        return self._delta(index, {"tool_calls": [call]})

    def _identified(self, index: int, call: int) -> dict[str, Any]:
        return {"id": call_id(self._layout.response_id, index, call), "type": "function"}

    def _logprobs(self, notes: Sequence[TokenNote]) -> dict[str, Any]:
        return {"content": [self._logprob(note) for note in notes], "refusal": None}

    def _logprob(self, note: TokenNote) -> dict[str, Any]:
        own = self._named(note.logprob.token, note.logprob.logprob)
        return {**own, "top_logprobs": [self._named(token, value) for token, value in note.logprob.top]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        name = list(self._vocabulary.names[token])
        return {"token": self._name(token), "logprob": finite(logprob), "bytes": name}
