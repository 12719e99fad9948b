"""The answer to a request that wants its prompt computed and nothing said: OpenAI's `prompt_cache_options.prewarm`.

It is served as one token, not streamed, by the worker that computes the prompt, where the KV cache stays as that of any
prompt does; the token is taken out of the answer here.
"""

from typing import Any, Final

import msgspec

from app.http.response import Headers
from app.serving.relay import Response
from app.serving.request import Prewarm
from planes.wire.response_object import response_event

_STREAM_OF: Final = {"chat.completion": "chat.completion.chunk", "text_completion": "text_completion"}
_NO_DETAILS: Final = {"reasoning_tokens": 0}


class PrewarmedResponse:
    """A `Response` for the relay that passes the answer on without its token."""

    def __init__(self, response: Response, wanted: Prewarm) -> None:
        self._response = response
        self._wanted = wanted
        self.begin, self.write, self.end = response.begin, response.write, response.end
        self.fail, self.keep_alive = response.fail, response.keep_alive

    @property
    def is_gone(self) -> bool:
        return self._response.is_gone

    @property
    def is_begun(self) -> bool:
        return self._response.is_begun

    @property
    def is_ended(self) -> bool:
        return self._response.is_ended

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        answer = _emptied(msgspec.json.decode(body))
        if not self._wanted.is_streaming:
            self._response.whole(status, headers, msgspec.json.encode(answer))
            return
        self._response.begin([(name, value) for name, value in headers if name != "content-type"])
        is_response = answer["object"] == "response"
        self._response.end(
            _response_events(answer) if is_response else _events(answer, include_usage=self._wanted.include_usage)
        )


def _emptied(answer: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's body without what was said."""
    usage = answer["usage"]
    if answer["object"] == "response":
        unsaid = {"output_tokens": 0, "output_tokens_details": _NO_DETAILS, "total_tokens": usage["input_tokens"]}
        return answer | {"status": "completed", "incomplete_details": None, "output": [], "usage": usage | unsaid}
    (choice,) = answer["choices"]
    said = {"message": {"role": "assistant", "content": "", "refusal": None}} if "message" in choice else {"text": ""}
    empty = {"index": 0, **said, "logprobs": None, "finish_reason": "length"}
    unsaid = {"completion_tokens": 0, "completion_tokens_details": _NO_DETAILS, "total_tokens": usage["prompt_tokens"]}
    return answer | {"choices": [empty], "usage": usage | unsaid}


def _events(answer: dict[str, Any], *, include_usage: bool) -> bytes:
    """The same as a stream."""
    usage = answer.pop("usage")
    chunk = answer | {"object": _STREAM_OF[answer["object"]]}
    (choice,) = chunk["choices"]
    if "message" in choice:
        choice["delta"] = {"role": "assistant", "content": choice.pop("message")["content"]}
    told = [chunk | ({"usage": None} if include_usage else {})]
    if include_usage:
        told.append(chunk | {"choices": [], "usage": usage})
    return b"".join([b"data: " + msgspec.json.encode(each) + b"\n\n" for each in told]) + b"data: [DONE]\n\n"


def _response_events(answer: dict[str, Any]) -> bytes:
    begun = answer | {"status": "in_progress", "usage": None}
    told = (("response.created", begun), ("response.in_progress", begun), ("response.completed", answer))
    return b"".join(
        [response_event(kind, number, msgspec.json.encode(body)) for number, (kind, body) in enumerate(told)]
    )
