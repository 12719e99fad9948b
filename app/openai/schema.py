"""What the gateway knows of a request after parsing, and the shape of the bodies it parses.

Field names are OpenAI's; those under "extensions" are vLLM's, as its users pass them through `extra_body`, and ours
(`slo_ttft_ms`, `timeout_ms`). A field is *supported* (typed below), *harmless* (accepted and ignored: it changes
nothing that a caller could see in the answer), or *unsupported* (refused, unless it holds a value that asks for
nothing). A field that is none of these is a misspelling and refused by name.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from planes.frames import Sampling

Json = Any
"""Any JSON value, decoded."""


class Kind(StrEnum):
    """Which of the two endpoints; the values are those of `planes.frames.Format.kind`."""

    CHAT = "chat"
    COMPLETION = "completion"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for. Counts, and characters for strings."""

    num_choices: int = 16
    num_stop: int = 16
    stop_chars: int = 1024
    num_stop_token_ids: int = 128
    num_logprobs: int = 20
    num_logit_bias: int = 1024
    num_messages: int = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class ParsedRequest:
    """A request whose every field is valid by itself; what depends on the model is checked by `app/preprocess.py`.

    messages: chat only, as the template gets them.  prompt: completions only, text or token ids (shape (n,), uint32).
    sampling: ranges checked; its `max_tokens` is 0 until `Preprocessor.prepare` has resolved the `max_tokens` here,
    where None means: as many as the context has room for.
    """

    kind: Kind
    model: str
    sampling: Sampling
    max_tokens: int | None
    messages: tuple[dict[str, Json], ...] = ()
    template_kwargs: dict[str, Json] | None = None
    prompt: str | npt.NDArray[np.uint32] = ""
    is_streaming: bool = False
    include_usage: bool = False
    echo: bool = False
    priority: int | None = None
    """Lower is sooner; None: the tenant's default."""
    cache_salt: str = ""
    user: str = ""
    num_bytes: int = 0
    """Of the body: a bound on the text in it, for whoever must decide how dear it is."""
    slo_ttft_s: float | None = None
    timeout_s: float | None = None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_obfuscation` pads events against traffic analysis; we never pad."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


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

    # extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    slo_ttft_ms: float | None = None
    timeout_ms: float | None = None

    # harmless
    metadata: Json = None
    service_tier: Json = None
    store: Json = None
    safety_identifier: Json = None
    prompt_cache_key: Json = None
    prompt_cache_retention: Json = None
    request_id: Json = None

    # unsupported, see UNSUPPORTED
    bad_words: Json = None
    use_beam_search: Json = None
    length_penalty: Json = None
    structured_outputs: Json = None
    guided_json: Json = None
    guided_regex: Json = None
    guided_choice: Json = None
    guided_grammar: Json = None
    response_format: Json = None
    prompt_logprobs: Json = None
    truncate_prompt_tokens: Json = None
    skip_special_tokens: Json = None
    spaces_between_special_tokens: Json = None
    include_stop_str_in_output: Json = None
    return_token_ids: Json = None
    return_tokens_as_token_ids: Json = None
    add_special_tokens: Json = None
    kv_transfer_params: Json = None


class FunctionCall(msgspec.Struct, frozen=True):
    """What an earlier answer called; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call in the history; new calls are not supported."""

    id: str
    function: FunctionCall
    type: str = "function"


class Part(msgspec.Struct, frozen=True):
    """A piece of a message's content; only text is served, the other kinds are named in the error."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One chat message; what an `openai` client sends back from an earlier answer is accepted whole."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: Json = None
    audio: Json = None
    function_call: Json = None


class ChatBody(CommonBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None

    # extensions
    chat_template_kwargs: dict[str, Json] | None = None

    # harmless
    parallel_tool_calls: Json = None

    # unsupported, see UNSUPPORTED
    tools: Json = None
    tool_choice: Json = None
    functions: Json = None
    function_call: Json = None
    audio: Json = None
    modalities: Json = None
    prediction: Json = None
    verbosity: Json = None
    web_search_options: Json = None
    chat_template: Json = None
    add_generation_prompt: Json = None
    continue_final_message: Json = None
    documents: Json = None


class CompletionBody(CommonBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    echo: bool | None = None
    logprobs: int | None = None

    # unsupported, see UNSUPPORTED
    best_of: Json = None
    suffix: Json = None
    prompt_embeds: Json = None


UNSUPPORTED: dict[str, tuple[Json, ...]] = {
    "bad_words": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "response_format": ({"type": "text"},),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "add_special_tokens": (),
    "kv_transfer_params": (),
}
"""Fields with an effect that is not offered, and their values (beside null) that ask for nothing."""

UNSUPPORTED_CHAT: dict[str, tuple[Json, ...]] = UNSUPPORTED | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
}

UNSUPPORTED_COMPLETION: dict[str, tuple[Json, ...]] = UNSUPPORTED | {
    "best_of": (1,),
    "suffix": ("",),
    "prompt_embeds": (),
}
