"""Bodies of POST /v1/chat/completions."""

from typing import Final

import msgspec

from app.openai.bodies import NESTED, UNSUPPORTED_CHAT, ChatBody
from app.openai.chat_tools import parse_chat_tools
from app.openai.decode import check_count, check_range, decode_known, shown
from app.openai.messages import check_number, template_messages
from app.openai.sampling import (
    Unsupported,
    parse_bad_words,
    parse_cache_salt,
    parse_max_tokens,
    parse_prewarm,
    parse_priority,
    parse_sampling,
    parse_seconds,
    parse_stream_options,
    parse_truncation,
)
from app.openai.schema import NULL, Json, Kind, Limits, ParsedRequest
from app.openai.structured import parse_structured
from planes.wire.errors import InvalidRequest
from planes.wire.unreadable import UNREADABLE

EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

_CHAT: Final = Kind.CHAT  # bound once, see CONTRIBUTING.md
_DECODER: Final = msgspec.json.Decoder(ChatBody)
_UNSUPPORTED: Final = Unsupported(UNSUPPORTED_CHAT)
_DEFAULT_LIMITS: Final = Limits()
_RESERVED: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def parse_chat(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ParsedRequest:
    """Raises:  InvalidRequest."""
    chat, ignored = decode_known(body, _DECODER, NESTED, is_strict=limits.has_strict_fields)
    _UNSUPPORTED.check(chat)
    max_tokens = _max_tokens(chat)
    is_streaming = bool(chat.stream)
    include_usage, has_continuous_usage = parse_stream_options(chat.stream_options, is_streaming=is_streaming)
    use = parse_chat_tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls, limits)
    structured = use.structured or parse_structured(chat, limits)  # a call that is forced leaves nothing else to bind
    is_continued = bool(chat.continue_final_message)
    return ParsedRequest(
        kind=_CHAT,
        model=chat.model,
        sampling=parse_sampling(
            chat, limits, max_tokens=max_tokens, logprobs=_logprobs(chat, limits), structured=structured
        ),
        max_tokens=max_tokens,
        messages=_messages(chat, limits),
        template_kwargs=_template_kwargs(chat, limits),
        tools=use.shown,
        documents=parse_documents(chat.documents, limits),
        parsing=use.parsing,
        is_reply=parse_is_reply(chat.add_generation_prompt, is_continued=is_continued),
        is_continued=is_continued,
        is_streaming=is_streaming,
        include_usage=include_usage,
        has_continuous_usage=has_continuous_usage,
        has_token_ids=bool(chat.return_token_ids),
        bad_words=parse_bad_words(chat.bad_words, limits),
        truncate_prompt_tokens=parse_truncation(chat.truncate_prompt_tokens),
        is_prewarm=parse_prewarm(chat.prompt_cache_options),
        priority=parse_priority(chat.priority, chat.service_tier),
        cache_salt=parse_cache_salt(chat.cache_salt),
        user=chat.user or "",
        num_bytes=len(body),
        slo_ttft_s=parse_seconds("slo_ttft_ms", chat.slo_ttft_ms),
        slo_itl_s=parse_seconds("slo_itl_ms", chat.slo_itl_ms),
        timeout_s=parse_seconds("timeout_ms", chat.timeout_ms),
        ignored=ignored,
    )


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


def parse_is_reply(add_generation_prompt: bool | None, *, is_continued: bool) -> bool:
    """Whether the prompt ends where an assistant's turn begins.  Raises:  InvalidRequest."""
    if is_continued and add_generation_prompt:
        raise InvalidRequest(
            "'continue_final_message' and 'add_generation_prompt' exclude each other; send one of them.",
            param="continue_final_message",
        )
    return not is_continued if add_generation_prompt is None else add_generation_prompt


def parse_documents(documents: list[dict[str, Json]] | None, limits: Limits) -> tuple[dict[str, Json], ...]:
    """Raises:  InvalidRequest for too many."""
    if not documents:
        return ()
    check_count("documents", len(documents), limits.num_documents, "documents")
    return tuple(documents)


def _template_kwargs(chat: ChatBody, limits: Limits) -> dict[str, Json] | None:
    """Also what OpenAI's `reasoning_effort` means to templates; what is given by name wins."""
    kwargs = parse_template_kwargs(chat.chat_template_kwargs, limits)
    if chat.reasoning_effort is not None:
        return {**effort_kwargs(chat.reasoning_effort), **(kwargs or {})}
    return kwargs


def parse_template_kwargs(raw: msgspec.Raw, limits: Limits) -> dict[str, Json] | None:
    """Of `chat_template_kwargs`.  Raises:  InvalidRequest."""
    if raw == NULL:
        return None
    check_count("chat_template_kwargs", len(raw), limits.template_kwargs_bytes, "bytes")
    kwargs = _decoded_kwargs(raw)
    for name in kwargs:
        if name in _RESERVED or name.endswith("_token") or not name.isidentifier() or name.startswith("_"):
            raise InvalidRequest(
                f"Invalid 'chat_template_kwargs': {shown(name)} is no name that a template may be given.",
                param="chat_template_kwargs",
            )
    return kwargs


def effort_kwargs(effort: str, *, param: str = "reasoning_effort") -> dict[str, Json]:
    """What a chat template is told of how much to think.  Raises:  InvalidRequest for an unknown word."""
    if effort not in EFFORTS:
        raise InvalidRequest(f"Invalid '{param}': {shown(effort)} is not one of {', '.join(EFFORTS)}.", param=param)
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def _decoded_kwargs(raw: msgspec.Raw) -> dict[str, Json]:
    try:
        return msgspec.json.decode(raw, type=dict[str, Json])
    except UNREADABLE as exc:
        raise InvalidRequest(
            f"Invalid type for 'chat_template_kwargs': it must be an object; the value is {shown(raw)}.",
            param="chat_template_kwargs",
            code="invalid_type",
        ) from exc


def _messages(chat: ChatBody, limits: Limits) -> tuple[dict[str, Json], ...]:
    check_number(chat.messages, limits)
    return template_messages(chat.messages)
