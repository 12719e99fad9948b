"""A response's input items, and what chat templates get in their place.

Items are finer than messages: a model's thoughts, its words and each of its calls are one each, and those that follow
each other are one turn. Whatever a model said is taken back as it is; items of tools that OpenAI runs itself are left
out, and named.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from app.openai.decode import check_count, decode_field, missing, not_text, shown
from app.openai.messages import call_arguments
from app.openai.responses.bodies import Item, Part
from app.openai.schema import NULL, Json, Limits
from planes.wire.errors import InvalidRequest
from planes.wire.response_object import item_id
from planes.wire.unreadable import UNREADABLE

_ITEMS: Final = msgspec.json.Decoder(list[msgspec.Raw])
_ITEM: Final = msgspec.json.Decoder(Item)
_TEXT: Final = msgspec.json.Decoder(str)
_OUTPUT: Final = msgspec.json.Decoder(str | list[Part])
_ROLES: Final = ("system", "developer", "user", "assistant")
_TEXTS: Final = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
_UNREADABLE: Final = {
    "compaction": "it is encrypted by whoever made it",
    "computer_call_output": "it is an image, and only text is supported",
}
"""Items without which the conversation would be another one."""


@dataclass(frozen=True, slots=True)
class ParsedItems:
    """items: in order.  raw: the JSON of each.  ignored: what was left out, by its name in the body."""

    items: tuple[Item, ...]
    raw: tuple[msgspec.Raw, ...]
    ignored: tuple[str, ...] = ()


def parse_input(value: msgspec.Raw, limits: Limits, *, name: str = "input") -> ParsedItems:
    """Of a text, or a list of items.  Raises:  InvalidRequest."""
    if bytes(value).startswith(b'"'):
        text = decode_field(name, value, _TEXT)
        message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
        return ParsedItems((Item("message", role="user", content=text),), (msgspec.Raw(msgspec.json.encode(message)),))
    every = decode_field(name, value, _ITEMS)
    check_count(name, len(every), limits.num_messages, "items")
    items: list[Item] = []
    raw: list[msgspec.Raw] = []
    ignored: list[str] = []
    for index, one in enumerate(every):
        where = f"{name}[{index}]"
        item = decode_field(where, one, _ITEM)
        if item.kind not in _READ:
            if item.kind in _UNREADABLE:
                raise InvalidRequest(
                    f"'{where}' is a {item.kind} item, which is not supported here: {_UNREADABLE[item.kind]}.",
                    param=where,
                    code="unsupported_parameter",
                )
            ignored.append(f"{where} ({item.kind})")
            continue
        _check(item, where)
        items.append(item)
        raw.append(one)
    return ParsedItems(tuple(items), tuple(raw), tuple(ignored))


def known_items(value: bytes | msgspec.Raw) -> tuple[Item, ...]:
    """Of a list that has been parsed before, or that a worker has written."""
    return tuple([_ITEM.decode(one) for one in _ITEMS.decode(value)])


def template_messages(items: Iterable[Item], instructions: str | None) -> tuple[dict[str, Json], ...]:
    """As chat templates get them. What comes first from system and developer is one message: many take only one."""
    turns = _Turns()
    if instructions:
        turns.told("system", instructions)
    for item in items:
        _READ[item.kind](turns, item)
    return turns.finished()


def listed_items(response: str, raw: Sequence[msgspec.Raw]) -> list[dict[str, Json]]:
    """As `GET …/input_items` tells them: whole, and each with an id."""
    listed: list[dict[str, Json]] = []
    for place, one in enumerate(raw):
        item: dict[str, Json] = msgspec.json.decode(one)
        kind = item.setdefault("type", "message")
        prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs", "custom_tool_call": "ctc"}.get(kind, "it")
        item["id"] = item.get("id") or item_id(f"{prefix}-in", response, place)
        if kind == "message":
            content = item.get("content")
            parts = [{"text": content}] if isinstance(content, str) else content or []
            item["content"] = [_whole_part(item, part) for part in parts]
        if kind == "reasoning":
            item.setdefault("summary", [])
        if item.get("status") is None:
            item["status"] = "completed"
        listed.append(item)
    return listed


def _whole_part(item: dict[str, Json], part: dict[str, Json]) -> dict[str, Json]:
    if part.get("type") == "refusal":
        return part
    text = part.get("text") or ""  # what a model said may have none
    if item["role"] == "assistant":
        return {"type": "output_text", "text": text, "annotations": part.get("annotations") or []}
    return {"type": "input_text", "text": text}


class _Turns:
    """The messages so far. What comes in pieces is put together when all are there."""

    def __init__(self) -> None:
        self._instructions: list[str] = []
        """What comes before all messages."""
        self._messages: list[dict[str, Json]] = []
        self._thoughts: dict[int, list[str]] = {}
        """By the place of their turn."""
        self._names: dict[str, str] = {}
        """Of the tools that were called, by the call's id."""

    def finished(self) -> tuple[dict[str, Json], ...]:
        for place, pieces in self._thoughts.items():
            turn = self._messages[place]
            turn["reasoning"] = turn["reasoning_content"] = "".join(pieces)  # templates know one or the other
        if not self._instructions:
            return tuple(self._messages)
        return {"role": "system", "content": "\n\n".join(self._instructions)}, *self._messages

    def told(self, role: str, text: str) -> None:
        """By a user, or by whoever instructs the model."""
        if role != "user" and not self._messages:
            self._instructions.append(text)
        else:
            self._messages.append({"role": role, "content": text})

    def said(self, text: str) -> None:
        """By the model."""
        turn = self._turn(after=("content", "tool_calls"))
        turn["content"] = text

    def thought(self, text: str) -> None:
        turn = self._turn(after=("content", "tool_calls"))
        turn["reasoning"] = turn["reasoning_content"] = ""
        self._thoughts.setdefault(len(self._messages) - 1, []).append(text)

    def called(self, call_id: str, name: str, arguments: Json) -> None:
        turn = self._turn(after=())
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        turn.setdefault("tool_calls", []).append(call)
        self._names[call_id] = name

    def answered(self, call_id: str, text: str, name: str | None) -> None:
        """By a tool."""
        message = {"role": "tool", "tool_call_id": call_id, "content": text}
        if found := name or self._names.get(call_id):
            message["name"] = found
        self._messages.append(message)

    def _turn(self, after: Sequence[str]) -> dict[str, Json]:
        """The model's turn that goes on; a new one if there is none, or if it has what this cannot come `after`."""
        if self._messages and self._messages[-1]["role"] == "assistant":
            last = self._messages[-1]
            if not any(last.get(field) for field in after):
                return last
        self._messages.append({"role": "assistant", "content": ""})
        return self._messages[-1]


def _message(turns: _Turns, item: Item) -> None:
    text = item.content if isinstance(item.content, str) else _joined(item.content or ())
    if item.role == "assistant":
        turns.said(text)
    else:
        turns.told(item.role or "user", text)


def _reasoning(turns: _Turns, item: Item) -> None:
    """Its words, or what sums them up; what is encrypted is for whoever encrypted it."""
    content = item.content if isinstance(item.content, str) else _joined(item.content or item.summary or ())
    if content:
        turns.thought(content)


def _function_call(turns: _Turns, item: Item) -> None:
    turns.called(item.call_id or item.id or "", item.name or "", call_arguments(item.arguments))


def _custom_call(turns: _Turns, item: Item) -> None:
    turns.called(item.call_id or item.id or "", item.name or "", {"input": item.input or ""})


def _call_output(turns: _Turns, item: Item) -> None:
    turns.answered(item.call_id or "", _output_text(item.output), item.name)


_READ: Final[dict[str, Callable[[_Turns, Item], None]]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _function_call,
    "function_call_output": _call_output,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _call_output,
    "item_reference": lambda _turns, _item: None,  # whoever resolves it puts the item in its place
}


def _joined(parts: Iterable[Part]) -> str:
    return "\n".join([(part.refusal if part.type == "refusal" else part.text) or "" for part in parts])


def _output_text(output: msgspec.Raw) -> str:
    if output == NULL:
        return ""
    try:
        value: Any = _OUTPUT.decode(output)
    except UNREADABLE:
        return bytes(output).decode(errors="replace")  # some other JSON value: as good a text as any
    return value if isinstance(value, str) else _joined(value)


def _check(item: Item, where: str) -> None:
    """Raises:  InvalidRequest for what nobody can answer to: an unknown role, no content, an image."""
    if item.kind == "message":
        if item.role not in _ROLES:
            raise InvalidRequest(
                f"Invalid '{where}.role': {shown(item.role)} is not one of {', '.join(_ROLES)}.", param=f"{where}.role"
            )
        if item.content is None and item.role != "assistant":
            raise missing(f"{where}.content")
        if isinstance(item.content, list) and item.role != "assistant":
            _check_parts(item.content, f"{where}.content")
    elif item.kind in ("function_call_output", "custom_tool_call_output"):
        try:
            parts = _OUTPUT.decode(item.output)
        except UNREADABLE:
            return
        if not isinstance(parts, str):
            _check_parts(parts, f"{where}.output")
    elif item.kind == "item_reference" and not item.id:
        raise InvalidRequest(
            f"'{where}' has neither a type nor a role nor the id of an item that it refers to.", param=where
        )


def _check_parts(parts: Sequence[Part], where: str) -> None:
    for index, part in enumerate(parts):
        if part.type not in _TEXTS and part.type != "refusal":
            raise not_text(f"{where}[{index}]", part.type)
        if (part.refusal if part.type == "refusal" else part.text) is None:
            raise missing(f"{where}[{index}].{'refusal' if part.type == 'refusal' else 'text'}")
