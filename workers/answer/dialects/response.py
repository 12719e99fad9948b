"""OpenAI's responses: typed events, numbered from 0, and the response object.

    created → in_progress → (output_item.added → … → output_item.done)* → completed, or incomplete

| item               | between added and done                                                                  |
|--------------------|-----------------------------------------------------------------------------------------|
| message            | content_part.added → output_text.delta* → output_text.done → content_part.done          |
| reasoning          | content_part.added → reasoning_text.delta* → reasoning_text.done → content_part.done    |
| function_call      | function_call_arguments.delta* → function_call_arguments.done                           |
| custom_tool_call   | custom_tool_call_input.delta* → custom_tool_call_input.done                             |

An item ends where the next begins; what comes amid a call's arguments waits until they are whole. Blanks between items
are nobody's: they are held until text follows, and an answer of nothing else is one message. The streamed and the whole
answer come from the same fold, so that items and ids agree.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

from planes.wire.frames import FinishReason, Format, Usage
from planes.wire.response_object import event, item_id, response_event, response_object
from workers.answer.calls import Turns
from workers.answer.custom_input import CustomInput
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Ending, FinishedChoice, TokenNote
from workers.answer.dialects.names import call_id
from workers.answer.dialects.openai import finite, token_name
from workers.answer.parts import CallArguments, CallStart, Content, Part, Reasoning

_encode = msgspec.json.encode
Json = dict[str, Any]
Event = tuple[str, Json]

_DELTA: Final = b"response.output_text.delta"


class _Item(Protocol):
    """An item that is being written."""

    def opened(self) -> list[Event]: ...
    def more(self, text: str) -> list[Event]: ...
    def closed(self, status: str) -> tuple[list[Event], Json]:
        """The last events, and the whole item."""


class ResponseDialect:
    """One response, which has one choice."""

    def __init__(self, layout: Format, vocabulary: Vocabulary) -> None:
        self._layout = layout
        self._vocabulary = vocabulary
        self._custom = frozenset(() if layout.parsing is None else layout.parsing.custom)
        self._number = 0
        """Of the next event."""
        self._items: list[Json] = []
        """Those that are whole."""
        self._item: _Item | None = None
        self._turns = Turns()
        self._texts: list[str] = []
        """Of the open message; the way that most tokens take ends here."""
        self._delta: tuple[bytes, bytes] | None = None
        """What stands before and after the number in a delta of the open message; None: there is none."""
        self._blank = ""
        self._pending: list[TokenNote] = []
        """Of tokens whose text has not been seen yet."""
        self._ending = Ending(FinishReason.STOP)

    def opening(self, index: int) -> bytes:
        del index
        started = response_object(self._layout, "in_progress")
        written = [response_event(f"response.{kind}", place, started) for place, kind in enumerate(_STARTS)]
        self._number = len(_STARTS)
        return b"".join(written)

    def text(self, index: int, text: str) -> bytes:
        if self._delta is None:
            return self.part(index, Content(text))
        number = self._number
        self._number = number + 1
        self._texts.append(text)
        before, after = self._delta
        return b'%b%d%b%b,"logprobs":[]}\n\n' % (before, number, after, _encode(text))

    def token(self, index: int, text: str, note: TokenNote) -> bytes:
        self._pending.append(note)
        return self.part(index, Content(text)) if text else b""

    def part(self, index: int, part: Part) -> bytes:
        del index
        return self._written(self._events(part))

    def closing(self, index: int, ending: Ending) -> bytes:
        del index
        return self._written(self._end(ending))

    def last(self, usage: Usage) -> bytes:
        status = self._status
        return response_event(f"response.{status}", self._number, self._object(status, usage))

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        (choice,) = choices
        if choice.notes is not None and all(isinstance(part, Content) for part in choice.parts):
            self._pending = list(choice.notes)
        for part in choice.parts:
            self._events(part)
        self._end(choice.ending)
        return self._object(self._status, usage)

    @property
    def _status(self) -> str:
        return "incomplete" if self._ending.finish is FinishReason.LENGTH else "completed"

    def _object(self, status: str, usage: Usage) -> bytes:
        return response_object(
            self._layout,
            status,
            output=_encode(self._items),
            usage=_encode(_usage(usage)),
            incomplete_reason="max_output_tokens" if status == "incomplete" else None,
        )

    def _events(self, part: Part) -> list[Event]:
        if not isinstance(part, Content):
            self._pending.clear()
        return [event for each in self._turns.advance(part) for event in self._told(each)]

    def _told(self, part: Part) -> list[Event]:
        match part:
            case Content(text):
                return self._content(text)
            case Reasoning(text):
                opened = [] if isinstance(self._item, _Reasoning) else self._open(_Reasoning(*self._next("rs")))
                return opened + self._more(text)
            case CallStart(call, name):
                called = call_id(self._layout.response_id, 0, call)
                if name in self._custom:
                    return self._open(_CustomCall(*self._next("ctc"), called, name))
                return self._open(_FunctionCall(*self._next("fc"), called, name))
            case CallArguments(text=text):
                return self._more(text)

    def _content(self, text: str) -> list[Event]:
        if isinstance(self._item, _Message):
            return self._more(text)
        self._blank += text
        if not self._blank.strip():
            return []
        return self._message()

    def _message(self) -> list[Event]:
        """Begin one, with the blanks that were held."""
        identifier, place = self._next("msg")
        held = self._blank
        self._texts = []
        opened = self._open(_Message(identifier, place, self._texts, self._logprob))
        before = b'event: %b\ndata: {"type":"%b","sequence_number":' % (_DELTA, _DELTA)
        after = b',"item_id":"%b","output_index":%d,"content_index":0,"delta":' % (identifier.encode(), place)
        self._delta = before, after
        return opened + self._more(held)

    def _more(self, text: str) -> list[Event]:
        if self._item is None:
            raise RuntimeError("a part of an item came before the item")
        if isinstance(self._item, _Message):
            self._item.notes += self._pending
            noted, self._pending = self._pending, []
            self._item.due = noted
        return self._item.more(text)

    def _open(self, item: _Item) -> list[Event]:
        closed = self._close("completed")
        self._item, self._blank = item, ""
        return closed + item.opened()

    def _close(self, status: str) -> list[Event]:
        self._delta = None
        if self._item is None:
            return []
        events, whole = self._item.closed(status)
        self._item = None
        self._items.append(whole)
        return events

    def _end(self, ending: Ending) -> list[Event]:
        self._ending = ending
        events = [event for part in self._turns.finish() for event in self._told(part)]
        if self._item is None and not self._items:
            events += self._message()
        if isinstance(self._item, _Message) and self._pending:
            events += self._more("")
        return events + self._close("incomplete" if ending.finish is FinishReason.LENGTH else "completed")

    def _next(self, prefix: str) -> tuple[str, int]:
        """Id and place of the item that is about to begin."""
        place = len(self._items) + (self._item is not None)
        return item_id(prefix, self._layout.response_id, place), place

    def _written(self, events: list[Event]) -> bytes:
        written = [
            event(f"response.{kind}", number, _encode(fields)[1:-1])
            for number, (kind, fields) in enumerate(events, self._number)
        ]
        self._number += len(events)
        return b"".join(written)

    def _logprob(self, note: TokenNote, *, has_bytes: bool) -> Json:
        own = self._named(note.logprob.token, note.logprob.logprob, has_bytes=has_bytes)
        return own | {"top_logprobs": [self._named(*other, has_bytes=has_bytes) for other in note.logprob.top]}

    def _named(self, token: int, logprob: float, *, has_bytes: bool) -> Json:
        name = self._vocabulary.names[token]
        named: Json = {"token": token_name(name), "logprob": finite(logprob)}
        return named | {"bytes": list(name)} if has_bytes else named


_STARTS: Final = ("created", "in_progress")


class _Message:
    """`texts` grows from outside, too."""

    def __init__(self, identifier: str, place: int, texts: list[str], logprob: Any) -> None:
        self._id = identifier
        self._where = {"item_id": identifier, "output_index": place, "content_index": 0}
        self._place = place
        self._texts = texts
        self._logprob = logprob
        self.notes: list[TokenNote] = []
        self.due: list[TokenNote] = []

    def opened(self) -> list[Event]:
        item = self._item("in_progress", [])
        return [
            ("output_item.added", {"output_index": self._place, "item": item}),
            ("content_part.added", {**self._where, "part": _output_text("", [])}),
        ]

    def more(self, text: str) -> list[Event]:
        due, self.due = self.due, []
        if not text and not due:
            return []
        self._texts.append(text)
        return [("output_text.delta", {**self._where, "delta": text, "logprobs": self._logprobs(due)})]

    def closed(self, status: str) -> tuple[list[Event], Json]:
        text = "".join(self._texts)
        part = _output_text(text, self._logprobs(self.notes, has_bytes=True))
        item = self._item(status, [part])
        return [
            ("output_text.done", {**self._where, "text": text, "logprobs": self._logprobs(self.notes)}),
            ("content_part.done", {**self._where, "part": part}),
            ("output_item.done", {"output_index": self._place, "item": item}),
        ], item

    def _logprobs(self, notes: Sequence[TokenNote], *, has_bytes: bool = False) -> list[Json]:
        return [self._logprob(note, has_bytes=has_bytes) for note in notes]

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}


class _Reasoning:
    """The model's thoughts, word for word; nothing sums them up."""

    def __init__(self, identifier: str, place: int) -> None:
        self._id = identifier
        self._where = {"item_id": identifier, "output_index": place, "content_index": 0}
        self._place = place
        self._texts: list[str] = []

    def opened(self) -> list[Event]:
        return [
            ("output_item.added", {"output_index": self._place, "item": self._item("in_progress", [])}),
            ("content_part.added", {**self._where, "part": {"type": "reasoning_text", "text": ""}}),
        ]

    def more(self, text: str) -> list[Event]:
        self._texts.append(text)
        return [("reasoning_text.delta", {**self._where, "delta": text})]

    def closed(self, status: str) -> tuple[list[Event], Json]:
        text = "".join(self._texts)
        part = {"type": "reasoning_text", "text": text}
        item = self._item(status, [part])
        return [
            ("reasoning_text.done", {**self._where, "text": text}),
            ("content_part.done", {**self._where, "part": part}),
            ("output_item.done", {"output_index": self._place, "item": item}),
        ], item

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"id": self._id, "type": "reasoning", "status": status, "summary": [], "content": content}


class _FunctionCall:
    """A call of a function; its arguments are JSON text, as the model wrote it."""

    def __init__(self, identifier: str, place: int, called: str, name: str) -> None:
        self._where = {"item_id": identifier, "output_index": place}
        self._place = place
        self._identity = {"id": identifier, "type": "function_call"}
        self._call = {"call_id": called, "name": name}
        self._texts: list[str] = []

    def opened(self) -> list[Event]:
        return [("output_item.added", {"output_index": self._place, "item": self._item("in_progress", "")})]

    def more(self, text: str) -> list[Event]:
        self._texts.append(text)
        return [("function_call_arguments.delta", {**self._where, "delta": text})]

    def closed(self, status: str) -> tuple[list[Event], Json]:
        arguments = "".join(self._texts)
        item = self._item(status, arguments)
        return [
            ("function_call_arguments.done", {**self._where, "arguments": arguments}),
            ("output_item.done", {"output_index": self._place, "item": item}),
        ], item

    def _item(self, status: str, arguments: str) -> Json:
        return {**self._identity, "status": status, **self._call, "arguments": arguments}


class _CustomCall:
    """A call of a custom tool, which takes free text."""

    def __init__(self, identifier: str, place: int, called: str, name: str) -> None:
        self._where = {"item_id": identifier, "output_index": place}
        self._place = place
        self._identity = {"id": identifier, "type": "custom_tool_call", "call_id": called, "name": name}
        self._reader = CustomInput()
        self._texts: list[str] = []

    def opened(self) -> list[Event]:
        return [("output_item.added", {"output_index": self._place, "item": {**self._identity, "input": ""}})]

    def more(self, text: str) -> list[Event]:
        return self._said(self._reader.advance(text))

    def closed(self, status: str) -> tuple[list[Event], Json]:
        del status  # its shape has none
        events = self._said(self._reader.finish())
        item = {**self._identity, "input": "".join(self._texts)}
        return [
            *events,
            ("custom_tool_call_input.done", {**self._where, "input": item["input"]}),
            ("output_item.done", {"output_index": self._place, "item": item}),
        ], item

    def _said(self, text: str) -> list[Event]:
        if not text:
            return []
        self._texts.append(text)
        return [("custom_tool_call_input.delta", {**self._where, "delta": text})]


def _output_text(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(usage: Usage) -> Json:
    cached = usage.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": usage.prompt_tokens - cached},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
