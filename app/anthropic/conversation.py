"""A conversation in Anthropic's blocks as the messages of a chat, which is what templates are written for."""

from collections.abc import Iterator
from typing import Final

import msgspec

from app.anthropic.schema import Block, Turn
from app.openai.decode import decode_field, missing, not_text, shown
from app.openai.messages import check_number
from app.openai.schema import NULL, Json, Limits
from planes.wire.errors import InvalidRequest

_ANYTHING: Final = msgspec.json.Decoder()
_ROLES: Final = ("user", "assistant", "system")


class _Source(msgspec.Struct, frozen=True):
    type: str
    data: str = ""


_SOURCE: Final = msgspec.json.Decoder(_Source)


def chat_messages(system: str | list[Block] | None, turns: list[Turn], limits: Limits) -> tuple[dict[str, Json], ...]:
    """What a chat template gets.  Raises:  InvalidRequest, naming the block."""
    check_number(turns, limits)
    messages: list[dict[str, Json]] = []
    if system:
        messages.append({"role": "system", "content": _text(system, "system")})
    for index, turn in enumerate(turns):
        if turn.role not in _ROLES:
            raise InvalidRequest(
                f"Invalid 'messages[{index}].role': {shown(turn.role)} is not one of {', '.join(_ROLES)}.",
                param=f"messages[{index}].role",
            )
        messages.extend(_turn(turn, f"messages[{index}].content"))
    return tuple(messages)


def _turn(turn: Turn, where: str) -> Iterator[dict[str, Json]]:
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
    elif turn.role == "assistant":
        yield _assistant(turn.content, where)
    else:
        yield from _user(turn.role, turn.content, where)


def _user(role: str, blocks: list[Block], where: str) -> Iterator[dict[str, Json]]:
    """Each tool's result is a message of its own, in the order in which it stands among the texts."""
    texts: list[str] = []
    for index, block in enumerate(blocks):
        if block.type != "tool_result":
            texts.append(_block_text(block, f"{where}[{index}]"))
            continue
        if texts:
            yield {"role": role, "content": "\n".join(texts)}
            texts = []
        if not block.tool_use_id:
            raise missing(f"{where}[{index}].tool_use_id")
        result = _text(block.content, f"{where}[{index}].content") if block.content else ""
        yield {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": f"Error: {result}" if block.is_error else result,
        }
    if texts or not blocks:
        yield {"role": role, "content": "\n".join(texts)}


def _assistant(blocks: list[Block], where: str) -> dict[str, Json]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Json]] = []
    for index, block in enumerate(blocks):
        match block.type:
            case "thinking":
                thoughts.append(block.thinking or "")
            case "redacted_thinking":
                pass  # nobody but its maker can read it
            case "tool_use":
                calls.append(_call(block, f"{where}[{index}]"))
            case _:
                texts.append(_block_text(block, f"{where}[{index}]"))
    message: dict[str, Json] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning"] = message["reasoning_content"] = "\n".join(thoughts)  # templates know one or the other
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Block, where: str) -> dict[str, Json]:
    if not block.name:
        raise missing(f"{where}.name")
    arguments: Json = {} if block.input == NULL else decode_field(f"{where}.input", block.input, _ANYTHING)
    return {"id": block.id or "", "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join([_block_text(block, f"{where}[{index}]") for index, block in enumerate(content)])


def _block_text(block: Block, where: str) -> str:
    """Raises:  InvalidRequest for what is not text."""
    if block.type == "text":
        if block.text is None:
            raise missing(f"{where}.text")
        return block.text
    if block.type == "document" and (text := _document(block)) is not None:
        return text
    raise not_text(where, block.type)


def _document(block: Block) -> str | None:
    """The text of a document that brings it along; None for any other."""
    try:
        source = decode_field("source", block.source, _SOURCE)
    except InvalidRequest:
        return None
    if source.type != "text":
        return None
    return f"{block.title}\n{source.data}" if block.title else source.data
