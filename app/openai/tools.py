"""What a request's tools come to: what the chat template is shown, what the worker looks for, what binds the answer.

The same for every dialect, which reads its own JSON into `Tool` and `ToolChoice`.

| choice   | the template shows | the answer is bound to                                                  |
|----------|--------------------|-------------------------------------------------------------------------|
| auto     | the allowed tools  | nothing; the worker looks for calls in the text                         |
| required | all tools          | a JSON list of `{"name": …, "parameters": …}` of the allowed tools      |
| named    | all tools          | the JSON object of that tool's arguments                                |
| none     | no tool            | nothing, and nothing is looked for                                      |

Where nothing binds the answer, a tool that must not be called is not shown; where something does, the prompt's
beginning stays as it is for every choice, and so does what is cached of it.

A *custom* tool takes free text. Models that are served here call functions, so it is shown as a function with one
argument, `input`; `Parsing.custom` names it, so that the call is written in its own shape. A grammar for its input
binds only a call that is forced, and only a regular expression does: otherwise the model is told of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from app.openai.decode import check_count, shown
from app.openai.schema import Json, Limits
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Parsing, StructuredOutput

_encode = msgspec.json.encode
_MAX_NAME: Final = 256


class Mode(StrEnum):
    """Whether tools are called."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Tool:
    """One function, or one custom tool.  parameters: a JSON schema; None: no arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Json] | None = None
    is_strict: bool | None = None
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """allowed: names that may be called; None: all.  named: the one that must be called, or ""."""

    mode: Mode = Mode.AUTO
    allowed: frozenset[str] | None = None
    named: str = ""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """shown: as chat templates get tools; empty: none.  parsing: None: nothing is looked for."""

    shown: tuple[dict[str, Json], ...] = ()
    parsing: Parsing | None = None
    structured: StructuredOutput | None = None


NO_TOOLS: Final = ToolUse()


def use_of(
    tools: Sequence[Tool], choice: ToolChoice, limits: Limits, *, is_parallel: bool = True, param: str = "tools"
) -> ToolUse:
    """
    Args:  param: the dialect's name for the list, for errors.
    Raises:  InvalidRequest for a choice that names no tool, too many tools or schemas too long, or a name that is none.
    """
    _check(tools, choice, limits, param)
    if not tools or choice.mode is Mode.NONE:
        return NO_TOOLS
    try:
        return _used(tools, choice, limits, is_parallel=is_parallel, param=param)
    except RecursionError as exc:
        raise InvalidRequest(f"Invalid '{param}': a tool's parameters are nested too deeply.", param=param) from exc


def _used(tools: Sequence[Tool], choice: ToolChoice, limits: Limits, *, is_parallel: bool, param: str) -> ToolUse:
    callable_ = tools if choice.allowed is None else [tool for tool in tools if tool.name in choice.allowed]
    is_forced = bool(choice.named) or choice.mode is Mode.REQUIRED
    if not is_forced and not callable_:
        return NO_TOOLS
    forms = tuple([_form(tool) for tool in callable_])
    parsing = Parsing(
        tools=_encode(forms),
        tool_choice=f"function:{choice.named}" if choice.named else choice.mode.value,
        is_parallel=is_parallel,
        custom=[tool.name for tool in callable_ if tool.is_custom],
    )
    if not is_forced:
        return ToolUse(forms, parsing)
    if choice.named:
        schema = _parameters(next(tool for tool in tools if tool.name == choice.named))
    else:
        schema = _any_call(callable_, is_parallel=is_parallel)
    encoded = _encode(schema)
    check_count(param, len(encoded), limits.schema_bytes, "bytes of schemas for the calls to be made")
    every = forms if callable_ is tools else tuple([_form(tool) for tool in tools])
    return ToolUse(every, parsing, StructuredOutput(json_schema=encoded.decode()))


def chosen_mode(word: str) -> ToolChoice:
    """A choice that OpenAI's dialects make by a word alone.  Raises:  InvalidRequest for any other word."""
    if word not in tuple(Mode):
        raise InvalidRequest(
            f"Invalid 'tool_choice': {shown(word)} is not one of {', '.join(Mode)}, nor an object.", param="tool_choice"
        )
    return ToolChoice(Mode(word))


def custom_tool(name: str, description: str | None, format_: dict[str, Json] | None, *, param: str) -> Tool:
    """A custom tool as a function.  format_: OpenAI's `{"type": "grammar", "syntax": …, "definition": …}` or text.

    Raises:  InvalidRequest for a format that is unknown.
    """
    told = description or ""
    text: dict[str, Json] = {"type": "string"}
    kind = (format_ or {}).get("type", "text")
    if kind == "grammar":
        inner = (format_ or {}).get("grammar", format_)  # chat wraps it once more
        grammar = inner if isinstance(inner, dict) else {}
        syntax, definition = grammar.get("syntax"), grammar.get("definition")
        if syntax not in ("lark", "regex") or not isinstance(definition, str):
            raise InvalidRequest(
                f"Invalid '{param}.format': a grammar has a 'syntax', lark or regex, and a 'definition'; "
                f"the value is {shown(format_)}.",
                param=f"{param}.format",
            )
        if syntax == "regex":
            text["pattern"] = definition
        words = "regular expression" if syntax == "regex" else "Lark grammar"
        told = f"{told}\n\n`input` must match this {words}:\n{definition}".strip()
    elif kind != "text":
        raise InvalidRequest(
            f"'{param}.format.type' is {shown(kind)}; text and grammar are supported here.",
            param=f"{param}.format.type",
            code="unsupported_parameter",
        )
    parameters = {
        "type": "object",
        "properties": {"input": text},
        "required": ["input"],
        "additionalProperties": False,
    }
    return Tool(name, told or None, parameters, is_custom=True)


def _check(tools: Sequence[Tool], choice: ToolChoice, limits: Limits, param: str) -> None:
    check_count(param, len(tools), limits.num_tools, "tools")
    names = {tool.name for tool in tools}
    for index, tool in enumerate(tools):
        if not 1 <= len(tool.name) <= _MAX_NAME:
            raise InvalidRequest(
                f"Invalid '{param}[{index}]': its name has {len(tool.name)} characters; 1 to {_MAX_NAME} are possible.",
                param=param,
            )
    wanted = [choice.named] if choice.named else sorted(choice.allowed or ())
    if missing := [name for name in wanted if name not in names]:
        raise InvalidRequest(
            f"Invalid 'tool_choice': {shown(missing[0])} is not among the tools of this request.", param="tool_choice"
        )
    is_forced = bool(choice.named) or choice.mode is Mode.REQUIRED
    if is_forced and (not tools or (choice.allowed is not None and not choice.allowed)):
        raise InvalidRequest(
            f"Invalid 'tool_choice': a tool must be called, and '{param}' has none that may be.", param="tool_choice"
        )


def _form(tool: Tool) -> dict[str, Json]:
    """As chat completions write a function, and as templates expect it."""
    function: dict[str, Json] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    if tool.is_strict is not None:
        function["strict"] = tool.is_strict
    return {"type": "function", "function": function}


def _parameters(tool: Tool) -> dict[str, Json]:
    return {"type": "object", "properties": {}} if tool.parameters is None else tool.parameters


def _any_call(tools: Sequence[Tool], *, is_parallel: bool) -> dict[str, Json]:
    """The schema of a list of calls."""
    calls, definitions = [], {}
    for index, tool in enumerate(tools):
        parameters = _parameters(tool)
        if _has_reference(parameters):
            # Its references start at its own root, which is somewhere else now.
            definitions[f"tool{index}"] = _moved(parameters, f"#/$defs/tool{index}")
            parameters = {"$ref": f"#/$defs/tool{index}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [tool.name]}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Json] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not is_parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def _has_reference(schema: Json) -> bool:
    if isinstance(schema, dict):
        return "$ref" in schema or any(map(_has_reference, schema.values()))
    return isinstance(schema, list) and any(map(_has_reference, schema))


def _moved(schema: Json, root: str) -> Any:
    """A copy whose references into its own document start at `root`."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
