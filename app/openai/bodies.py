"""The shape of OpenAI's two bodies.

Field names are OpenAI's; those under "extensions" are vLLM's, as its users pass them through `extra_body`, and ours
(`slo_ttft_ms`, `slo_itl_ms`, `timeout_ms`). A field is *supported* (typed below), *harmless* (accepted and ignored: it
changes nothing that a caller could see in the answer), or *unsupported* (refused, unless it holds a value that asks for
nothing). A field that is none of these is ignored and named in the answer's head, or refused (`--strict-fields`).
"""

from typing import Final

import msgspec

from app.openai.schema import NULL, Json


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_obfuscation` pads events against traffic analysis; we never pad."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class PromptCacheOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is cached, and for how long, is the workers' to decide; `prewarm` asks for the prompt alone."""

    mode: str | None = None
    ttl: str | None = None
    prewarm: bool | None = None


NESTED: Final[dict[str, type[msgspec.Struct]]] = {
    "stream_options": StreamOptions,
    "prompt_cache_options": PromptCacheOptions,
}
"""Fields that are objects with fields of their own to know."""


class CommonBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields that both endpoints share. null means the same as leaving the field out."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    service_tier: str | None = None
    response_format: msgspec.Raw = NULL
    prompt_cache_options: PromptCacheOptions | None = None

    # extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: msgspec.Raw = NULL
    guided_json: msgspec.Raw = NULL
    guided_regex: msgspec.Raw = NULL
    guided_choice: msgspec.Raw = NULL
    guided_grammar: msgspec.Raw = NULL
    thinking_token_budget: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    timeout_ms: float | None = None

    # harmless
    metadata: msgspec.Raw = NULL
    store: msgspec.Raw = NULL
    safety_identifier: msgspec.Raw = NULL
    prompt_cache_key: msgspec.Raw = NULL
    prompt_cache_retention: msgspec.Raw = NULL
    request_id: msgspec.Raw = NULL
    session_id: msgspec.Raw = NULL

    # unsupported, see UNSUPPORTED
    use_beam_search: msgspec.Raw = NULL
    length_penalty: msgspec.Raw = NULL
    spaces_between_special_tokens: msgspec.Raw = NULL
    return_tokens_as_token_ids: msgspec.Raw = NULL
    return_token_offsets: msgspec.Raw = NULL
    add_special_tokens: msgspec.Raw = NULL
    truncation_side: msgspec.Raw = NULL
    allowed_token_ids: msgspec.Raw = NULL
    logprob_token_ids: msgspec.Raw = NULL
    repetition_detection: msgspec.Raw = NULL
    watermarking: msgspec.Raw = NULL
    vllm_xargs: msgspec.Raw = NULL
    kv_transfer_params: msgspec.Raw = NULL
    ec_transfer_params: msgspec.Raw = NULL


class FunctionCall(msgspec.Struct, frozen=True):
    """What an earlier answer called; `arguments` is JSON text, as long as the model wrote JSON."""

    name: str = ""
    arguments: msgspec.Raw = NULL


class CustomCall(msgspec.Struct, frozen=True):
    """A call of a tool that takes free text."""

    name: str = ""
    input: str = ""


class ToolCall(msgspec.Struct, frozen=True):
    """A call in the history."""

    id: str | None = None
    function: FunctionCall | None = None
    custom: CustomCall | None = None


class Part(msgspec.Struct, frozen=True):
    """A piece of a message's content; only text is served, the other kinds are named in the error."""

    type: str
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One chat message; what an `openai` client sends back from an earlier answer is accepted whole."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    function_call: FunctionCall | None = None


class ChatBody(CommonBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    tools: msgspec.Raw = NULL
    tool_choice: msgspec.Raw = NULL
    parallel_tool_calls: msgspec.Raw = NULL

    # extensions
    chat_template_kwargs: msgspec.Raw = NULL
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Json]] | None = None

    # harmless
    verbosity: msgspec.Raw = NULL
    prediction: msgspec.Raw = NULL

    # unsupported, see UNSUPPORTED
    functions: msgspec.Raw = NULL
    function_call: msgspec.Raw = NULL
    audio: msgspec.Raw = NULL
    modalities: msgspec.Raw = NULL
    moderation: msgspec.Raw = NULL
    web_search_options: msgspec.Raw = NULL
    chat_template: msgspec.Raw = NULL
    echo: msgspec.Raw = NULL
    include_reasoning: msgspec.Raw = NULL
    return_prompt_text: msgspec.Raw = NULL
    media_io_kwargs: msgspec.Raw = NULL
    mm_processor_kwargs: msgspec.Raw = NULL


class CompletionBody(CommonBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions."""

    prompt: msgspec.Raw
    """See `app/openai/prompt.py`."""
    echo: bool | None = None
    logprobs: int | None = None

    # unsupported, see UNSUPPORTED
    best_of: msgspec.Raw = NULL
    suffix: msgspec.Raw = NULL
    prompt_embeds: msgspec.Raw = NULL


UNSUPPORTED: dict[str, tuple[Json, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_offsets": (False,),
    "add_special_tokens": (),
    "truncation_side": ("left",),
    "allowed_token_ids": ([],),
    "logprob_token_ids": ([],),
    "repetition_detection": (),
    "watermarking": (False,),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
}
"""Fields with an effect that is not offered, and their values (beside null) that ask for nothing."""

UNSUPPORTED_CHAT: dict[str, tuple[Json, ...]] = UNSUPPORTED | {
    "add_special_tokens": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "web_search_options": (),
    "chat_template": (),
    "echo": (False,),
    "include_reasoning": (True,),
    "return_prompt_text": (False,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

UNSUPPORTED_COMPLETION: dict[str, tuple[Json, ...]] = UNSUPPORTED | {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "suffix": ("",),
    "prompt_embeds": (),
}
