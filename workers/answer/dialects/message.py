"""Anthropic's messages: content blocks that open and close one after another, as the kind of what is said changes.

    message_start → ping → (content_block_start → content_block_delta… → content_block_stop)…
    → message_delta → message_stop

What comes amid a call's arguments waits until they are whole, since only one block is open at a time.
What was cached is told at the end, when it is known: `message_start` counts the whole prompt as read anew.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from planes.wire.frames import FinishReason, Format, Usage
from planes.wire.unreadable import UNREADABLE
from workers.answer.calls import Turns
from workers.answer.dialects.base import Ending, FinishedChoice, TokenNote
from workers.answer.dialects.names import item_id
from workers.answer.parts import CallArguments, CallStart, Content, Part, Reasoning, merged

_encode = msgspec.json.encode

_PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'
_MESSAGE_STOP: Final = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_TEXT, _THINKING, _TOOL_USE = "text", "thinking", "tool_use"


class MessageDialect:
    """One message, streamed or whole; it has one choice."""

    def __init__(self, layout: Format, *, prompt_tokens: int) -> None:
        self._layout = layout
        self._prompt_tokens = prompt_tokens
        self._block = -1
        self._open = ""
        """Type of the block that is open; "": none is."""
        self._text_start = b""
        """Goes before the text of the open block's next delta, if it is a block of text."""
        self._thoughts = _Signature()
        self._turns = Turns()
        self._ending: dict[str, Any] = {}

    def opening(self, index: int) -> bytes:
        del index
        message = self._message([], {"stop_reason": None, "stop_sequence": None}, Usage(self._prompt_tokens, 0, 0))
        return _event("message_start", {"message": message}) + _PING

    def text(self, index: int, text: str) -> bytes:
        if self._open != _TEXT:
            return self.part(index, Content(text))
        return b"%b%b}}\n\n" % (self._text_start, _encode(text))

    def token(self, index: int, text: str, note: TokenNote) -> bytes:
        """Log probabilities have no words here."""
        del note
        return self.text(index, text) if text else b""

    def part(self, index: int, part: Part) -> bytes:
        del index
        return b"".join([self._told(each) for each in self._turns.advance(part)])

    def closing(self, index: int, ending: Ending) -> bytes:
        del index
        self._ending = self._ended(ending)
        return b"".join([self._told(part) for part in self._turns.finish()]) + self._closed()

    def last(self, usage: Usage) -> bytes:
        return _event("message_delta", {"delta": self._ending, "usage": _usage(usage)}) + _MESSAGE_STOP

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        (choice,) = choices
        return _encode(self._message(self._blocks(choice), self._ended(choice.ending), usage))

    def _message(self, content: list[dict[str, Any]], ending: dict[str, Any], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._layout.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._layout.model,
            "content": content,
            **ending,
            "usage": _usage(usage),
        }

    def _blocks(self, choice: FinishedChoice) -> list[dict[str, Any]]:
        parts = [part for each in choice.parts for part in self._turns.advance(each)] + self._turns.finish()
        blocks: list[dict[str, Any]] = []
        for part in merged(parts):
            match part:
                case Content(text):
                    blocks.append({"type": _TEXT, "text": text})
                case Reasoning(text):
                    signature = _Signature()
                    signature.add(text)
                    blocks.append({"type": _THINKING, "thinking": text, "signature": signature.take()})
                case CallStart(call, name):
                    blocks.append({"type": _TOOL_USE, "id": self._call_id(call), "name": name, "input": {}})
                case CallArguments(text=text):
                    blocks[-1]["input"] = _input(text)
        return blocks

    def _ended(self, ending: Ending) -> dict[str, Any]:
        if ending.finish is FinishReason.LENGTH:
            reason = "model_context_window_exceeded" if self._layout.is_context_bound else "max_tokens"
        elif ending.stop:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if ending.has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": ending.stop or None}

    def _told(self, part: Part) -> bytes:
        match part:
            case Content(text):
                opened = b"" if self._open == _TEXT else self._opened(_TEXT, {"text": ""})
                return opened + self.text(0, text)
            case Reasoning(text):
                opened = b"" if self._open == _THINKING else self._opened(_THINKING, {"thinking": "", "signature": ""})
                self._thoughts.add(text)
                return opened + self._delta({"type": "thinking_delta", "thinking": text})
            case CallStart(call, name):
                return self._opened(_TOOL_USE, {"id": self._call_id(call), "name": name, "input": {}})
            case CallArguments(text=text):
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def _opened(self, kind: str, block: dict[str, Any]) -> bytes:
        """The open block, if any, closed, and another one opened."""
        closed = self._closed()
        self._block += 1
        self._open = kind
        self._text_start = (
            b"event: content_block_delta\ndata: "
            b'{"type":"content_block_delta","index":%d,"delta":{"type":"text_delta","text":' % self._block
        )
        start = {"index": self._block, "content_block": {"type": kind, **block}}
        return closed + _event("content_block_start", start)

    def _closed(self) -> bytes:
        if not self._open:
            return b""
        signed = b""
        if self._open == _THINKING:
            signed = self._delta({"type": "signature_delta", "signature": self._thoughts.take()})
        self._open = ""
        return signed + _event("content_block_stop", {"index": self._block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": self._block, "delta": delta})

    def _call_id(self, call: int) -> str:
        return item_id("toolu_", self._layout.response_id, call)


class _Signature:
    """Clients want thoughts signed, and send the signature back unread: a digest will do."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, text: str) -> None:
        self._digest.update(text.encode("utf-8", "surrogatepass"))

    def take(self) -> str:
        """Of what has been added since the last call."""
        signature = self._digest.hexdigest()
        self._digest = hashlib.blake2b(digest_size=16)
        return signature


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as the object that they have to be; what is none is handed on as the model wrote it."""
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except UNREADABLE:
        return {"arguments": arguments}


def _usage(usage: Usage) -> dict[str, Any]:
    """`input_tokens` are those that were neither read from a cache nor written to one. Whatever is computed stays
    cached here, but nobody pays for that, so it counts as plain input.
    """
    told: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens:
        told["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return told
