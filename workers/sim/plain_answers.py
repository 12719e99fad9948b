"""How the plain HTTP front of the simulated engine words its answers: one class for each API, and HTTP's frame."""

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}
_json = msgspec.json.Encoder().encode


def head(status: int, content_type: str) -> bytes:
    """Of an answer in chunks."""
    return (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n"
    ).encode()


def chunk(data: bytes) -> bytes:
    """Of such an answer; the empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def message(status: int, body: Any) -> bytes:
    """A whole answer."""
    data = _json(body)
    return (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    ).encode() + data


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _json({"type": name, **fields}))


class Answer(Protocol):
    """One request's. `delta` is called for each step; `finish` is OpenAI's word."""

    def begin(self) -> bytes: ...

    def delta(self, text: str) -> bytes: ...

    def end(self, num_tokens: int, finish: str) -> bytes: ...

    def whole(self, text: str, num_tokens: int, finish: str) -> Any: ...


class ChatAnswer:
    """Chat completions, and the older completions. What does not change between tokens is encoded once."""

    def __init__(self, request: str, model: str, num_prompt_tokens: int, *, is_chat: bool = True) -> None:
        self._is_chat, self._num_prompt_tokens = is_chat, num_prompt_tokens
        kind = "chat.completion" if is_chat else "text_completion"
        self._kind = kind
        self._fields = {"id": request, "created": 0, "model": model}
        opened = _json({**self._fields, "object": f"{kind}.chunk" if is_chat else kind})[:-1]
        self._before = (
            b"data: " + opened + b',"choices":[{"index":0,' + (b'"delta":{"content":' if is_chat else b'"text":')
        )
        self._after = (b"}" if is_chat else b"") + b',"finish_reason":null}]}\n\n'

    def begin(self) -> bytes:
        return b""

    def delta(self, text: str) -> bytes:
        return self._before + _json(text) + self._after

    def end(self, num_tokens: int, finish: str) -> bytes:
        kind = f"{self._kind}.chunk" if self._is_chat else self._kind
        said: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        fields = {**self._fields, "object": kind}
        last = {**fields, "choices": [{"index": 0, **said, "finish_reason": finish}]}
        usage = {**fields, "choices": [], "usage": self._usage(num_tokens)}
        return b"data: %b\n\ndata: %b\n\ndata: [DONE]\n\n" % (_json(last), _json(usage))

    def whole(self, text: str, num_tokens: int, finish: str) -> Any:
        said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choices = [{"index": 0, **said, "finish_reason": finish}]
        return {**self._fields, "object": self._kind, "choices": choices, "usage": self._usage(num_tokens)}

    def _usage(self, num_tokens: int) -> dict[str, int]:
        total = self._num_prompt_tokens + num_tokens
        return {"prompt_tokens": self._num_prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}


class ResponsesAnswer:
    """OpenAI's responses: one message item with one text part."""

    def __init__(self, request: str, model: str, num_prompt_tokens: int) -> None:
        self._id, self._item, self._model = f"resp_{request}", f"msg_{request}", model
        self._num_prompt_tokens = num_prompt_tokens
        self._sequence = 0
        self._text: list[str] = []

    def begin(self) -> bytes:
        opened = self._response("in_progress", [], None)
        item = {"type": "message", "id": self._item, "role": "assistant", "status": "in_progress", "content": []}
        return b"".join(
            [
                self._next("response.created", response=opened),
                self._next("response.in_progress", response=opened),
                self._next("response.output_item.added", output_index=0, item=item),
                self._next("response.content_part.added", **self._place(), part=_part("")),
            ]
        )

    def delta(self, text: str) -> bytes:
        self._text.append(text)
        return self._next("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def end(self, num_tokens: int, finish: str) -> bytes:
        text = "".join(self._text)
        whole = self.whole(text, num_tokens, finish)
        return b"".join(
            [
                self._next("response.output_text.done", **self._place(), text=text, logprobs=[]),
                self._next("response.content_part.done", **self._place(), part=_part(text)),
                self._next("response.output_item.done", output_index=0, item=whole["output"][0]),
                self._next(f"response.{whole['status']}", response=whole),
            ]
        )

    def whole(self, text: str, num_tokens: int, finish: str) -> Any:
        total = self._num_prompt_tokens + num_tokens
        usage = {
            "input_tokens": self._num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": total,
        }
        status = "incomplete" if finish == "length" else "completed"
        item = {"type": "message", "id": self._item, "role": "assistant", "status": status, "content": [_part(text)]}
        return self._response(status, [item], usage)

    def _response(self, status: str, output: list[Any], usage: Any) -> dict[str, Any]:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": 0,
            "status": status,
            "model": self._model,
            "output": output,
            "usage": usage,
            "error": None,
            "incomplete_details": details,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _next(self, name: str, **fields: Any) -> bytes:
        self._sequence += 1
        return _event(name, sequence_number=self._sequence - 1, **fields)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class MessagesAnswer:
    """Anthropic's messages: one block of text."""

    def __init__(self, request: str, model: str, num_prompt_tokens: int) -> None:
        self._id, self._model, self._num_prompt_tokens = f"msg_{request}", model, num_prompt_tokens

    def begin(self) -> bytes:
        opened = self._message([], 0, None)
        block = {"type": "text", "text": ""}
        return _event("message_start", message=opened) + _event("content_block_start", index=0, content_block=block)

    def delta(self, text: str) -> bytes:
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def end(self, num_tokens: int, finish: str) -> bytes:
        delta = {"stop_reason": _stop_reason(finish), "stop_sequence": None}
        usage = {"output_tokens": num_tokens}
        return (
            _event("content_block_stop", index=0)
            + _event("message_delta", delta=delta, usage=usage)
            + _event("message_stop")
        )

    def whole(self, text: str, num_tokens: int, finish: str) -> Any:
        return self._message([{"type": "text", "text": text}], num_tokens, _stop_reason(finish))

    def _message(self, content: list[Any], num_tokens: int, stop_reason: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {"input_tokens": self._num_prompt_tokens, "output_tokens": num_tokens},
        }


def _stop_reason(finish: str) -> str:
    return "max_tokens" if finish == "length" else "end_turn"


def _completion(request: str, model: str, num_prompt_tokens: int) -> Answer:
    return ChatAnswer(request, model, num_prompt_tokens, is_chat=False)


DIALECTS: dict[str, Callable[[str, str, int], Answer]] = {
    "/v1/chat/completions": ChatAnswer,
    "/v1/completions": _completion,
    "/v1/responses": ResponsesAnswer,
    "/v1/messages": MessagesAnswer,
}
"""By path."""
