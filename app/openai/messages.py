"""The messages of a chat: what clients send back and forth in, what chat templates get out.

A client sends back what a model said, whatever that was: an empty answer, arguments that are cut off, a call of a tool
that is not there. None of it is refused, or the conversation would be stuck for good. Keys that nobody knows are left
out, as are parts of an assistant's content that are no text.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from app.openai.bodies import FunctionCall, Message, Part, ToolCall
from app.openai.decode import check_count, missing, not_text, shown
from app.openai.schema import Json, Limits
from planes.wire.errors import InvalidRequest
from planes.wire.unreadable import UNREADABLE

_ROLES: Final = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {"function": "tool"}
"""By their names, also OpenAI's older one."""
_SAID: Final = frozenset({"assistant", "tool"})
"""Roles whose content may be missing."""
_TEXTS: Final = frozenset({"text", "input_text", "output_text"})


def check_number(messages: Sequence[object], limits: Limits) -> None:
    """Raises:  InvalidRequest for none, or too many."""
    if not messages:
        raise InvalidRequest("Invalid 'messages': it must hold at least one message.", param="messages")
    check_count("messages", len(messages), limits.num_messages, "messages")


def template_messages(messages: Sequence[Message]) -> tuple[dict[str, Json], ...]:
    """As chat templates get them.  Raises:  InvalidRequest naming the message and the field."""
    return tuple([_message(message, index) for index, message in enumerate(messages)])


def _message(message: Message, index: int) -> dict[str, Json]:
    role, content = _ROLES.get(message.role), message.content
    if role is None:
        raise InvalidRequest(
            f"Invalid 'messages[{index}].role': {shown(message.role)} is not one of {', '.join(_ROLES)}.",
            param=f"messages[{index}].role",
        )
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if isinstance(content, list):
        if role == "assistant" and reasoning is None:
            reasoning = "".join([part.thinking or "" for part in content if part.type == "thinking"]) or None
        content = _text(content, f"messages[{index}].content", is_models=role == "assistant")
    if content is None and role not in _SAID:
        raise InvalidRequest(
            f"Invalid 'messages[{index}].content': it must be a string or a list of text parts.",
            param=f"messages[{index}].content",
        )
    rendered: dict[str, Json] = {"role": role, "content": content or message.refusal or ""}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if reasoning is not None:
        rendered["reasoning"] = rendered["reasoning_content"] = reasoning  # templates know one or the other
    calls = message.tool_calls or ()
    if message.function_call is not None:
        calls = [*calls, ToolCall(function=message.function_call)]
    if calls:
        rendered["tool_calls"] = [_tool_call(call) for call in calls]
    return rendered


def _text(parts: Sequence[Part], name: str, *, is_models: bool) -> str:
    """Parts are joined by newlines, as vLLM joins them for templates that expect a string."""
    texts: list[str] = []
    for index, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in _TEXTS and part.type != "refusal":
            if is_models:
                continue
            raise not_text(f"{name}[{index}]", part.type)
        if text is None:
            raise missing(f"{name}[{index}].{part.type}")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: ToolCall) -> dict[str, Json]:
    """A custom call as the call of a function, which is what its tool is shown as."""
    arguments: Json
    if call.custom is not None:
        name, arguments = call.custom.name, {"input": call.custom.input}
    else:
        function = call.function or FunctionCall()
        name, arguments = function.name, call_arguments(function.arguments)
    return {"id": call.id or "", "type": "function", "function": {"name": name, "arguments": arguments}}


def call_arguments(raw: msgspec.Raw) -> Json:
    """What a template gets for a call's `arguments`: an object, where the API sends JSON text.

    What is no object of JSON stays the text that the model wrote.
    """
    text: Any = _decoded(raw)
    if not isinstance(text, str):
        return {} if text is None else text
    value = _decoded(text.encode(errors="surrogatepass")) if text.strip() else {}
    return value if isinstance(value, dict) else text


def _decoded(text: bytes | msgspec.Raw) -> Json:
    try:
        return msgspec.json.decode(text)
    except UNREADABLE:
        return bytes(text).decode(errors="replace")
