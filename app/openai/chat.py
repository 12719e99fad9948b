"""Bodies of POST /v1/chat/completions."""

from typing import Any, Final

import msgspec

from app.openai.decode import check_count, check_range, decode, shown
from app.openai.sampling import (
    Unsupported,
    parse_cache_salt,
    parse_max_tokens,
    parse_priority,
    parse_sampling,
    parse_seconds,
)
from app.openai.schema import (
    NULL,
    UNSUPPORTED_CHAT,
    ChatBody,
    Json,
    Kind,
    Limits,
    Message,
    ParsedRequest,
    Part,
    StreamOptions,
    ToolCall,
)
from planes.wire.errors import InvalidRequest

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_DECODER: Final = msgspec.json.Decoder(ChatBody)
_UNSUPPORTED: Final = Unsupported(UNSUPPORTED_CHAT)
_DEFAULT_LIMITS: Final = Limits()
_RESERVED: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def parse_chat(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ParsedRequest:
    """Raises:  InvalidRequest."""
    chat = decode(body, _DECODER)
    _UNSUPPORTED.check(chat)
    max_tokens = _max_tokens(chat)
    return ParsedRequest(
        kind=Kind.CHAT,
        model=chat.model,
        sampling=parse_sampling(chat, limits, max_tokens=max_tokens, logprobs=_logprobs(chat, limits)),
        max_tokens=max_tokens,
        messages=_messages(chat.messages, limits),
        template_kwargs=_template_kwargs(chat, limits),
        is_streaming=bool(chat.stream),
        include_usage=parse_stream_options(chat.stream_options, is_streaming=bool(chat.stream)),
        priority=parse_priority(chat.priority),
        cache_salt=parse_cache_salt(chat.cache_salt),
        user=chat.user or "",
        num_bytes=len(body),
        slo_ttft_s=parse_seconds("slo_ttft_ms", chat.slo_ttft_ms),
        timeout_s=parse_seconds("timeout_ms", chat.timeout_ms),
    )


def parse_stream_options(options: StreamOptions | None, *, is_streaming: bool) -> bool:
    """Whether the stream shall end with the usage.  Raises:  InvalidRequest."""
    if options is None:
        return False
    if not is_streaming:
        raise InvalidRequest(
            "Invalid 'stream_options': it is allowed only together with 'stream': true.", param="stream_options"
        )
    if options.continuous_usage_stats:
        raise InvalidRequest(
            "'stream_options.continuous_usage_stats' is not supported here; leave it out.",
            param="stream_options.continuous_usage_stats",
            code="unsupported_parameter",
        )
    return bool(options.include_usage)


def _max_tokens(chat: ChatBody) -> int | None:
    """`max_tokens` is the old name of `max_completion_tokens`."""
    new = parse_max_tokens("max_completion_tokens", chat.max_completion_tokens)
    old = parse_max_tokens("max_tokens", chat.max_tokens)
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            f"'max_tokens' ({old}) and 'max_completion_tokens' ({new}) differ; send one of them.",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _logprobs(chat: ChatBody, limits: Limits) -> int | None:
    if chat.top_logprobs is not None:
        check_range("top_logprobs", chat.top_logprobs, 0, limits.num_logprobs)
        if not chat.logprobs and chat.top_logprobs:
            raise InvalidRequest(
                f"Invalid 'top_logprobs': {chat.top_logprobs} needs 'logprobs': true.", param="top_logprobs"
            )
    return (chat.top_logprobs or 0) if chat.logprobs else None


def _template_kwargs(chat: ChatBody, limits: Limits) -> dict[str, Json] | None:
    kwargs: dict[str, Json] | None = None
    if chat.chat_template_kwargs != NULL:
        check_count("chat_template_kwargs", len(chat.chat_template_kwargs), limits.template_kwargs_bytes, "bytes")
        kwargs = _decoded_kwargs(chat.chat_template_kwargs)
        for name in kwargs:
            if name in _RESERVED or name.endswith("_token") or not name.isidentifier() or name.startswith("_"):
                raise InvalidRequest(
                    f"Invalid 'chat_template_kwargs': {shown(name)} is no name that a template may be given.",
                    param="chat_template_kwargs",
                )
    if chat.reasoning_effort is not None:
        return {**(kwargs or {}), "reasoning_effort": chat.reasoning_effort}
    return kwargs


def _decoded_kwargs(raw: msgspec.Raw) -> dict[str, Json]:
    try:
        return msgspec.json.decode(raw, type=dict[str, Json])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(
            f"Invalid type for 'chat_template_kwargs': it must be an object; the value is {shown(raw)}.",
            param="chat_template_kwargs",
            code="invalid_type",
        ) from exc


def _messages(messages: list[Message], limits: Limits) -> tuple[dict[str, Json], ...]:
    if not messages:
        raise InvalidRequest("Invalid 'messages': it must hold at least one message.", param="messages")
    check_count("messages", len(messages), limits.num_messages, "messages")
    return tuple([_message(message, index) for index, message in enumerate(messages)])


def _message(message: Message, index: int) -> dict[str, Json]:
    role, content = message.role, message.content
    if role not in ROLES:
        raise InvalidRequest(
            f"Invalid 'messages[{index}].role': {shown(role)} is not one of {', '.join(ROLES)}.",
            param=f"messages[{index}].role",
        )
    for field in ("audio", "function_call"):
        if getattr(message, field) != NULL:
            raise InvalidRequest(
                f"'messages[{index}].{field}' is not supported here; leave it out.",
                param=f"messages[{index}].{field}",
                code="unsupported_parameter",
            )
    if content is None and not (role == "assistant" and (message.tool_calls or message.refusal)):
        raise InvalidRequest(
            f"Invalid 'messages[{index}].content': it must be a string or a list of text parts.",
            param=f"messages[{index}].content",
        )
    text = _text(content, f"messages[{index}].content") if isinstance(content, list) else content
    rendered: dict[str, Json] = {"role": role, "content": text or message.refusal or ""}
    for field in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, field)) is not None:
            rendered[field] = value
    if message.reasoning is not None and message.reasoning_content is None:
        rendered["reasoning_content"] = message.reasoning
    if message.tool_calls:
        rendered["tool_calls"] = [_tool_call(call, index) for call in message.tool_calls]
    return rendered


def _text(parts: list[Part], name: str) -> str:
    """Parts are joined by newlines, as vLLM joins them for templates that expect a string."""
    texts: list[str] = []
    for index, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "refusal"):
            raise InvalidRequest(
                f"Invalid '{name}[{index}].type': {shown(part.type)} content is not supported; only text is.",
                param=f"{name}[{index}].type",
                code="unsupported_parameter",
            )
        if text is None:
            raise InvalidRequest(
                f"Missing required parameter: '{name}[{index}].{part.type}'.",
                param=f"{name}[{index}].{part.type}",
                code="missing_required_parameter",
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: ToolCall, index: int) -> dict[str, Json]:
    """Templates expect `arguments` as an object, the API sends it as text."""
    try:
        arguments: Any = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.DecodeError, RecursionError) as exc:
        name = f"messages[{index}].tool_calls.function.arguments"
        raise InvalidRequest(
            f"Invalid '{name}': {shown(call.function.arguments)} is not valid JSON.", param=name
        ) from exc
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
