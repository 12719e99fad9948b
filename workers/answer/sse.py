"""The JSON of OpenAI's answers. Whatever is the same for all events of a request is encoded once, when it starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from planes.wire.frames import FinishReason, Format, Usage
from workers.answer.detokenizer import Vocabulary
from workers.engine.base import TokenLogprob

_LEAST_LOGPROB = -9999.0
"""JSON knows no infinity."""

_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class TokenNote:
    """What the answer says about one token: its log probability, and where its text begins in the answer's text."""

    logprob: TokenLogprob
    text_offset: int


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """One whole choice of an answer that is not streamed."""

    index: int
    text: str
    notes: Sequence[TokenNote] | None
    finish: FinishReason


class EventWriter:
    """Writes the server-sent events, or the one body, of one request."""

    def __init__(self, layout: Format, num_choices: int, vocabulary: Vocabulary) -> None:
        self._layout = layout
        self.is_streaming = layout.is_streaming
        self._is_chat = layout.kind == "chat"
        self._vocabulary = vocabulary
        kind = {"chat": "chat.completion", "completion": "text_completion"}[layout.kind]
        if self._is_chat and layout.is_streaming:
            kind += ".chunk"
        self._identity = {
            "id": layout.response_id,
            "object": kind,
            "created": layout.created,
            "model": layout.model,
        }
        start = b"data: " + _encode(self._identity)[:-1] + b',"choices":['
        self._starts = [start + b'{"index":%d,' % index for index in range(num_choices)]
        self._text = b'"delta":{"content":' if self._is_chat else b'"text":'
        self._text_end = b"}" if self._is_chat else b""
        self._end = b'}],"usage":null}\n\n' if layout.include_usage else b"}]}\n\n"
        self._text_starts = [choice + self._text for choice in self._starts]
        self._plain_end = self._text_end + b',"logprobs":null,"finish_reason":null' + self._end

    def opening(self, index: int) -> bytes:
        """Goes before a choice's first token: the role in a chat, the prompt in a completion that echoes it."""
        if self._is_chat:
            role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            return self._starts[index] + role + self._end
        return self.text(index, self._layout.echo) if self._layout.echo else b""

    def text(self, index: int, text: str) -> bytes:
        return self._text_starts[index] + _encode(text) + self._plain_end

    def token(self, index: int, text: str, note: TokenNote) -> bytes:
        """A token with its log probability; `text` may be empty, or reach back to earlier tokens."""
        logprobs = b',"logprobs":' + _encode(self._logprobs([note])) + b',"finish_reason":null'
        return self._text_starts[index] + _encode(text) + self._text_end + logprobs + self._end

    def closing(self, index: int, finish: FinishReason) -> bytes:
        nothing = b'"delta":{}' if self._is_chat else b'"text":""'
        return self._starts[index] + nothing + b',"logprobs":null,"finish_reason":' + _encode(finish) + self._end

    def last(self, usage: Usage) -> bytes:
        """What follows the last choice's closing."""
        if not self._layout.include_usage:
            return b"data: [DONE]\n\n"
        return b"data: " + _encode(self._identity | {"choices": [], "usage": _usage(usage)}) + b"\n\ndata: [DONE]\n\n"

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        written = [self._choice(choice) for choice in choices]
        return _encode(self._identity | {"choices": written, "usage": _usage(usage)})

    def _choice(self, choice: FinishedChoice) -> dict[str, Any]:
        text: dict[str, Any] = {"text": self._layout.echo + choice.text}
        if self._is_chat:
            text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        logprobs = None if choice.notes is None else self._logprobs(choice.notes)
        return {"index": choice.index, **text, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(self, notes: Sequence[TokenNote]) -> dict[str, Any]:
        if self._is_chat:
            return {"content": [self._chat_logprob(note.logprob) for note in notes], "refusal": None}
        return {
            "tokens": [self._name(note.logprob.token) for note in notes],
            "token_logprobs": [_finite(note.logprob.logprob) for note in notes],
            "top_logprobs": [self._alternatives(note.logprob) for note in notes],
            "text_offset": [len(self._layout.echo) + note.text_offset for note in notes],
        }

    def _chat_logprob(self, logprob: TokenLogprob) -> dict[str, Any]:
        own = self._named(logprob.token, logprob.logprob)
        return {**own, "top_logprobs": [self._named(token, value) for token, value in logprob.top]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        name = list(self._vocabulary.names[token])
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": name}

    def _alternatives(self, logprob: TokenLogprob) -> dict[str, float]:
        """Completions count the token itself among its alternatives, so there may be one more than asked for."""
        every = (*logprob.top, (logprob.token, logprob.logprob))
        return {self._name(token): _finite(value) for token, value in every}

    def _name(self, token: int) -> str:
        """A token as text; OpenAI's spelling where its bytes are no whole characters."""
        name = self._vocabulary.names[token]
        try:
            return name.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in name)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
