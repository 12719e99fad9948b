"""What chat completions and completions have in common. Whatever is the same for all events of an answer is encoded
once, when it starts.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt

from planes.wire.frames import Format, Sampling, Usage
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Ending, TokenNews
from workers.engine.base import TokenLogprob

encode = msgspec.json.encode

_LEAST_LOGPROB = -9999.0
"""JSON knows no infinity."""


class OpenAiDialect:
    """Chunks of an OpenAI stream; `kind` is their `object`."""

    has_prompt_in_choice: ClassVar[bool]
    """Whether the prompt's token ids stand in each choice, not beside the choices."""

    def __init__(
        self, layout: Format, sampling: Sampling, vocabulary: Vocabulary, prompt: npt.NDArray[np.uint32], *, kind: str
    ) -> None:
        self._layout = layout
        self._vocabulary = vocabulary
        self._prompt = prompt
        self._told: set[int] = set()
        """Choices whose first event has been told of."""
        self._identity = {
            "id": layout.response_id,
            "object": kind,
            "created": layout.created,
            "model": layout.model,
        }
        start = b"data: " + encode(self._identity)[:-1] + b',"choices":['
        self._starts = [start + b'{"index":%d,' % index for index in range(sampling.n)]
        self._end = b'}],"usage":null}\n\n' if layout.include_usage else b"}]}\n\n"

    def told(self, index: int, event: bytes, news: TokenNews) -> bytes:
        """The event, of the choice `index`, with what the client wants to know of the tokens behind it."""
        of_choice: dict[str, Any] = {}
        of_answer: dict[str, Any] = {"usage": None} if self._layout.include_usage else {}
        if self._layout.has_token_ids:
            of_choice["token_ids"] = news.tokens
            if index not in self._told:
                self._told.add(index)
                owner = of_choice if self.has_prompt_in_choice else of_answer
                owner["prompt_token_ids"] = self._prompt.tolist()
        if self._layout.has_continuous_usage:
            of_answer["usage"] = self._usage_so_far(news)
        choice, answer = encode(of_choice)[1:-1], encode(of_answer)[1:-1]
        told = (event[: -len(self._end)], choice and b"," + choice, b"}]", answer and b"," + answer, b"}\n\n")
        return b"".join(told)

    def _usage_so_far(self, news: TokenNews) -> dict[str, Any]:
        """Of one choice. Details follow at the end: what was cached is the worker's, not the tokens'."""
        prompt_tokens = len(self._prompt)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": news.num_tokens,
            "total_tokens": prompt_tokens + news.num_tokens,
        }

    def _ranked(self, logprobs: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """The prompt's log probabilities, as vLLM spells them."""
        return [None if logprob is None else self._ranks(logprob) for logprob in logprobs]

    def _ranks(self, logprob: TokenLogprob) -> dict[str, Any]:
        ranks = {logprob.token: (logprob.logprob, logprob.rank)}
        ranks |= {token: (value, place) for place, (token, value) in enumerate(logprob.top, 1)}
        return {
            str(token): {
                "logprob": finite(value),
                "rank": rank,
                "decoded_token": self._vocabulary.names[token].decode(errors="replace"),
            }
            for token, (value, rank) in ranks.items()
        }

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
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
