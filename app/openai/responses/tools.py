"""The tools of a response: flat where chat's are nested, and of many types, of which two are served.

Clients list tools that OpenAI runs itself, and such as only some models know, beside their own: those are left out and
named, as the model could not have called them anyway.
"""

from typing import Final

from app.openai.decode import missing, shown
from app.openai.responses.bodies import ResponseBody, ToolChoiceObject, ToolOption
from app.openai.schema import Json, Limits
from app.openai.tools import Mode, Tool, ToolChoice, ToolUse, chosen_mode, custom_tool, use_of
from planes.wire.errors import InvalidRequest

_SERVED: Final = ("function", "custom")


def response_tools(response: ResponseBody, limits: Limits) -> tuple[ToolUse, tuple[str, ...]]:
    """What they come to, and which are left out.  Raises:  InvalidRequest."""
    listed = response.tools or []
    unserved = tuple([f"tools[{at}] ({tool.type})" for at, tool in enumerate(listed) if tool.type not in _SERVED])
    use = use_of(
        [_tool(tool, f"tools[{at}]") for at, tool in enumerate(listed) if tool.type in _SERVED],
        _choice(response.tool_choice),
        limits,
        is_parallel=response.parallel_tool_calls is not False,
    )
    return use, unserved


def repeated_tools(response: ResponseBody) -> list[dict[str, Json]]:
    """Those that are served, as the answer says them again."""
    return [_repeated(tool) for tool in response.tools or () if tool.type in _SERVED]


def repeated_choice(response: ResponseBody) -> Json:
    """The choice, as the answer says it again."""
    choice = response.tool_choice
    if not isinstance(choice, ToolChoiceObject):
        return choice or "auto"
    if choice.type == "allowed_tools":
        tools = [{"type": tool.type, "name": tool.name} for tool in choice.tools or ()]
        return {"type": choice.type, "mode": choice.mode or "auto", "tools": tools}
    return {"type": choice.type, "name": choice.name}


def _tool(tool: ToolOption, param: str) -> Tool:
    if tool.name is None:
        raise missing(f"{param}.name")
    if tool.type == "custom":
        return custom_tool(tool.name, tool.description, tool.format, param=param)
    return Tool(tool.name, tool.description, tool.parameters, tool.strict)


def _choice(choice: str | ToolChoiceObject | None) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    if isinstance(choice, str):
        return chosen_mode(choice)
    if choice.type == "allowed_tools" and choice.mode in (None, "auto", "required"):
        names = [tool.name for tool in choice.tools or () if tool.type in _SERVED and tool.name is not None]
        return ToolChoice(Mode(choice.mode or "auto"), frozenset(names))
    if choice.type in _SERVED and choice.name is not None:
        return ToolChoice(Mode.REQUIRED, named=choice.name)
    raise InvalidRequest(
        f"Invalid 'tool_choice': {shown(choice)} asks for no tool that can be called here; an object is "
        "{'type': 'function' or 'custom', 'name': …} or {'type': 'allowed_tools', 'mode': …, 'tools': […]}.",
        param="tool_choice",
    )


def _repeated(tool: ToolOption) -> dict[str, Json]:
    told: dict[str, Json] = {"type": tool.type, "name": tool.name, "description": tool.description}
    if tool.type == "custom":
        return told | {"format": tool.format or {"type": "text"}}
    return told | {"parameters": tool.parameters, "strict": bool(tool.strict)}
