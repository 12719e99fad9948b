"""Bodies of `POST /v1/messages` and of `/v1/messages/count_tokens`."""

from typing import Final

import msgspec

from app.anthropic.conversation import chat_messages
from app.anthropic.schema import NESTED, ConversationBody, MessageBody, ToolChoice
from app.anthropic.schema import Tool as AnthropicTool
from app.openai import tools
from app.openai.decode import check_range, decode_known, missing, shown
from app.openai.sampling import parse_cache_salt, parse_max_tokens, parse_priority, parse_seconds, parse_stop
from app.openai.schema import Json, Kind, Limits, ParsedRequest
from app.openai.structured import json_schema
from app.openai.tools import Mode, Tool, ToolUse
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Sampling, StructuredOutput

_MESSAGE: Final = msgspec.json.Decoder(MessageBody)
_COUNT: Final = msgspec.json.Decoder(ConversationBody)
_DEFAULT_LIMITS: Final = Limits()
_THINKING: Final = ("enabled", "adaptive", "between_tools", "disabled")
_INT32: Final = 2**31 - 1


def parse_message(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ParsedRequest:
    """Raises:  InvalidRequest."""
    message, ignored = decode_known(body, _MESSAGE, NESTED, is_strict=limits.has_strict_fields)
    used = _tool_use(message, limits)
    sampling = _sampling(message, limits, used)
    return _parsed(
        message,
        limits,
        used,
        sampling=sampling,
        max_tokens=parse_max_tokens("max_tokens", message.max_tokens),
        num_bytes=len(body),
        is_streaming=bool(message.stream),
        priority=parse_priority(message.priority),
        cache_salt=parse_cache_salt(message.cache_salt),
        user=(message.metadata and message.metadata.user_id) or "",
        slo_ttft_s=parse_seconds("slo_ttft_ms", message.slo_ttft_ms),
        slo_itl_s=parse_seconds("slo_itl_ms", message.slo_itl_ms),
        timeout_s=parse_seconds("timeout_ms", message.timeout_ms),
        ignored=ignored,
    )


def parse_count(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ParsedRequest:
    """A prompt that is only to be counted.  Raises:  InvalidRequest."""
    conversation, ignored = decode_known(body, _COUNT, NESTED, is_strict=limits.has_strict_fields)
    used = _tool_use(conversation, limits)
    return _parsed(
        conversation,
        limits,
        used,
        sampling=Sampling(max_tokens=0),
        max_tokens=1,
        num_bytes=len(body),
        ignored=ignored,
    )


def _parsed(
    conversation: ConversationBody,
    limits: Limits,
    used: ToolUse,
    *,
    sampling: Sampling,
    max_tokens: int | None,
    num_bytes: int,
    **rest: Json,
) -> ParsedRequest:
    messages = chat_messages(conversation.system, conversation.messages, limits)
    is_prefilled = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    return ParsedRequest(
        kind=Kind.MESSAGE,
        model=conversation.model,
        sampling=sampling,
        max_tokens=max_tokens,
        messages=messages,
        template_kwargs=_template_kwargs(conversation),
        tools=used.shown,
        parsing=used.parsing,
        is_reply=not is_prefilled,
        is_continued=is_prefilled,
        num_bytes=num_bytes,
        **rest,
    )


def _template_kwargs(conversation: ConversationBody) -> dict[str, Json] | None:
    kwargs: dict[str, Json] = {}
    thinking, config = conversation.thinking, conversation.output_config
    if thinking is not None:
        if thinking.type not in _THINKING:
            raise InvalidRequest(
                f"Invalid 'thinking.type': {shown(thinking.type)} is not one of {', '.join(_THINKING)}.",
                param="thinking.type",
            )
        kwargs["enable_thinking"] = thinking.type != "disabled"
    if config is not None and config.effort is not None:
        kwargs["reasoning_effort"] = config.effort
    return kwargs or None


def _tool_use(conversation: ConversationBody, limits: Limits) -> ToolUse:
    """The service's own tools, which nobody runs here, are left out."""
    functions = [
        _function(tool, index) for index, tool in enumerate(conversation.tools or ()) if tool.type in (None, "custom")
    ]
    choice = conversation.tool_choice
    is_parallel = not (choice is not None and choice.disable_parallel_tool_use)
    return tools.use_of(functions, _choice(choice), limits, is_parallel=is_parallel)


def _function(tool: AnthropicTool, index: int) -> Tool:
    if tool.input_schema is None:
        raise missing(f"tools[{index}].input_schema")
    return Tool(tool.name, tool.description, tool.input_schema, is_strict=tool.strict)


def _choice(choice: ToolChoice | None) -> tools.ToolChoice:
    match choice and choice.type:
        case None | "auto":
            return tools.ToolChoice()
        case "none":
            return tools.ToolChoice(Mode.NONE)
        case "any":
            return tools.ToolChoice(Mode.REQUIRED)
        case "tool" if choice is not None and choice.name:
            return tools.ToolChoice(named=choice.name)
        case "tool":
            raise missing("tool_choice.name")
        case unknown:
            raise InvalidRequest(
                f"Invalid 'tool_choice.type': {shown(unknown)} is not one of auto, any, tool, none.",
                param="tool_choice.type",
            )


def _sampling(message: MessageBody, limits: Limits, used: ToolUse) -> Sampling:
    temperature, top_p, top_k = message.temperature, message.top_p, message.top_k
    if temperature is not None:
        check_range("temperature", temperature, 0.0, 1.0)
    if top_p is not None:
        check_range("top_p", top_p, 0.0, 1.0)
    if top_k is not None:
        check_range("top_k", top_k, 0, _INT32)
    if top_p == 0:
        top_p, top_k = None, 1  # no probability mass is the likeliest token alone; engines want more than 0
    if message.seed is not None:
        check_range("seed", message.seed, -(2**63), 2**63 - 1)
    if message.min_tokens is not None:
        check_range("min_tokens", message.min_tokens, 0, max(message.max_tokens, 0))
    return Sampling(
        max_tokens=0,
        min_tokens=message.min_tokens or 0,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=top_k or 0,
        seed=message.seed,
        stop=parse_stop("stop_sequences", message.stop_sequences, limits) if message.stop_sequences else [],
        ignore_eos=bool(message.ignore_eos),
        structured=_structured(message, limits, used),
        thinking_tokens=_thinking_tokens(message),
    )


def _structured(message: MessageBody, limits: Limits, used: ToolUse) -> StructuredOutput | None:
    """A tool that must be called comes before the answer's format, which holds for the turn after it."""
    wanted = message.output_config and message.output_config.format
    if used.structured is not None or not wanted:
        return used.structured
    if wanted.type != "json_schema":
        raise InvalidRequest(
            f"Invalid 'output_config.format.type': {shown(wanted.type)} is not json_schema.",
            param="output_config.format.type",
        )
    return json_schema("output_config.format.schema", wanted.schema, limits)


def _thinking_tokens(message: MessageBody) -> int | None:
    thinking = message.thinking
    if thinking is None or thinking.type != "enabled" or thinking.budget_tokens is None:
        return None
    check_range("thinking.budget_tokens", thinking.budget_tokens, 1, _INT32)
    return thinking.budget_tokens
