"""The tools of a chat completion: its JSON read into the terms of `tools.py`."""

from typing import Final, Literal

import msgspec

from app.openai.decode import decode_field, shown
from app.openai.schema import NULL, Json, Limits
from app.openai.tools import NO_TOOLS, Mode, Tool, ToolChoice, ToolUse, chosen_mode, custom_tool, use_of
from planes.wire.errors import InvalidRequest


class _Function(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: dict[str, Json] | None = None
    strict: bool | None = None


class _Custom(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    format: dict[str, Json] | None = None


class _Tool(msgspec.Struct, frozen=True):
    type: str = "function"
    function: _Function | None = None
    custom: _Custom | None = None


class _Named(msgspec.Struct, frozen=True):
    name: str


class _AllowedTool(msgspec.Struct, frozen=True):
    function: _Named | None = None
    custom: _Named | None = None
    name: str | None = None


class _Allowed(msgspec.Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: list[_AllowedTool]


class _Choice(msgspec.Struct, frozen=True):
    type: str = "function"
    function: _Named | None = None
    custom: _Named | None = None
    allowed_tools: _Allowed | None = None


_TOOLS: Final = msgspec.json.Decoder(list[_Tool])
_CHOICE: Final = msgspec.json.Decoder(str | _Choice)
_PARALLEL: Final = msgspec.json.Decoder(bool)


def parse_chat_tools(tools: msgspec.Raw, choice: msgspec.Raw, parallel: msgspec.Raw, limits: Limits) -> ToolUse:
    """Of the three fields, each of which may be NULL.  Raises:  InvalidRequest."""
    if tools == NULL and choice == NULL:
        return NO_TOOLS
    listed = [] if tools == NULL else decode_field("tools", tools, _TOOLS)
    return use_of(
        [_tool(tool, index) for index, tool in enumerate(listed)],
        ToolChoice() if choice == NULL else _choice(decode_field("tool_choice", choice, _CHOICE)),
        limits,
        is_parallel=True if parallel == NULL else decode_field("parallel_tool_calls", parallel, _PARALLEL),
    )


def _tool(tool: _Tool, index: int) -> Tool:
    param = f"tools[{index}]"
    if tool.type == "function" and (function := tool.function) is not None:
        return Tool(function.name, function.description, function.parameters, function.strict)
    if tool.type == "custom" and (custom := tool.custom) is not None:
        return custom_tool(custom.name, custom.description, custom.format, param=f"{param}.custom")
    if tool.type not in ("function", "custom"):
        raise InvalidRequest(
            f"'{param}.type' is {shown(tool.type)}; function and custom are supported here.",
            param=f"{param}.type",
            code="unsupported_parameter",
        )
    raise InvalidRequest(
        f"Missing required parameter: '{param}.{tool.type}'.", param=param, code="missing_required_parameter"
    )


def _choice(choice: str | _Choice) -> ToolChoice:
    if isinstance(choice, str):
        return chosen_mode(choice)
    if choice.type == "allowed_tools" and (allowed := choice.allowed_tools) is not None:
        named = [tool.function or tool.custom for tool in allowed.tools]
        names = [tool.name if name is None else name.name for tool, name in zip(allowed.tools, named, strict=True)]
        return ToolChoice(Mode(allowed.mode), frozenset(name for name in names if name is not None))
    only = {"function": choice.function, "custom": choice.custom}.get(choice.type)
    if only is None:
        raise InvalidRequest(
            "Invalid 'tool_choice': an object is {'type': T, T: {…}}, where T is function, custom or allowed_tools.",
            param="tool_choice",
        )
    return ToolChoice(Mode.REQUIRED, named=only.name)
