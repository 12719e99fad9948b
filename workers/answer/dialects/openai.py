"""What chat completions and completions have in common. Whatever is the same for all events of an answer is encoded
once, when it starts.
"""

from typing import Any

import msgspec

from planes.wire.frames import Format, Usage
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Ending

encode = msgspec.json.encode

_LEAST_LOGPROB = -9999.0
"""JSON knows no infinity."""


class OpenAiDialect:
    """Chunks of an OpenAI stream; `kind` is their `object`."""

    def __init__(self, layout: Format, num_choices: int, vocabulary: Vocabulary, *, kind: str) -> None:
        self._layout = layout
        self._vocabulary = vocabulary
        self._identity = {
            "id": layout.response_id,
            "object": kind,
            "created": layout.created,
            "model": layout.model,
        }
        start = b"data: " + encode(self._identity)[:-1] + b',"choices":['
        self._starts = [start + b'{"index":%d,' % index for index in range(num_choices)]
        self._end = b'}],"usage":null}\n\n' if layout.include_usage else b"}]}\n\n"

    def last(self, usage: Usage) -> bytes:
        if not self._layout.include_usage:
            return b"data: [DONE]\n\n"
        told = self._identity | {"choices": [], "usage": usage_of(usage)}
        return b"data: " + encode(told) + b"\n\ndata: [DONE]\n\n"

    def _name(self, token: int) -> str:
        return token_name(self._vocabulary.names[token])


def token_name(name: bytes) -> str:
    """A token as text; OpenAI's spelling where its bytes are no whole characters."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in name)


def finite(logprob: float) -> float:
    """A log probability that JSON can say."""
    return max(logprob, _LEAST_LOGPROB)


def finish_reason(ending: Ending) -> str:
    """In OpenAI's words."""
    return "tool_calls" if ending.has_calls and ending.finish == "stop" else ending.finish


def usage_of(usage: Usage) -> dict[str, Any]:
    """In OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
