"""What the gateway knows of a request after parsing, and the shape of the bodies it parses.

Field names are OpenAI's; those under "extensions" are vLLM's, as its users pass them through `extra_body`, and ours
(`slo_ttft_ms`, `timeout_ms`). A field is *supported* (typed below), *harmless* (accepted and ignored: it changes
nothing that a caller could see in the answer), or *unsupported* (refused, unless it holds a value that asks for
nothing). A field that is none of these is a misspelling and refused by name.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from planes.wire.frames import Parsing, Sampling

Json = Any
"""Any JSON value, decoded."""

NULL: Final = msgspec.Raw(b"null")
"""A field that was left out. Fields whose value is not looked at stay raw: a large one would be dear to build."""


class Kind(StrEnum):
    """Which dialect; the values are those of `planes.wire.frames.Format.kind`."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSE = "response"
    MESSAGE = "message"

    @property
    def is_conversation(self) -> bool:
        """Whether its prompt is made of messages, by the model's chat template."""
        return self is not Kind.COMPLETION


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
    template_kwargs_bytes: int = 65_536
    num_tools: int = 1024
    num_documents: int = 1024
    num_bad_words: int = 128


@dataclass(frozen=True, slots=True, eq=False)
class ParsedRequest:
    """A request whose every field is valid by itself; what depends on the model is checked by `app/prompt/prepare.py`.

    messages, tools, documents: chat only, as the template gets them.  prompt: completions only, text or token ids
    (shape (n,), uint32).
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
    tools: tuple[dict[str, Json], ...] = ()
    documents: tuple[dict[str, Json], ...] = ()
    parsing: Parsing | None = None
    """What the worker looks for in the text; None: nothing."""
    is_reply: bool = True
    """Whether the prompt ends where an assistant's turn begins; the template's `add_generation_prompt`."""
    is_continued: bool = False
    """Whether the last message is left open, for the answer to go on with it."""
    truncate_prompt_tokens: int | None = None
    """Keep this many of the prompt's last tokens; -1: as many as leave room for an answer.  None: all or none."""
    bad_words: tuple[str, ...] = ()
    """They become `Sampling.bad_words` where the tokenizer is known."""
    is_local_only: bool = False
    """Whether one worker must compute all of it."""
    is_prewarm: bool = False
    """Whether only the prompt is to be computed, for a later request to find cached."""
    has_continuous_usage: bool = False
    has_token_ids: bool = False
    ignored: tuple[str, ...] = ()
    """Names of fields that nobody here knows."""


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
    metadata: msgspec.Raw = NULL
    service_tier: msgspec.Raw = NULL
    store: msgspec.Raw = NULL
    safety_identifier: msgspec.Raw = NULL
    prompt_cache_key: msgspec.Raw = NULL
    prompt_cache_retention: msgspec.Raw = NULL
    request_id: msgspec.Raw = NULL

    # unsupported, see UNSUPPORTED
    bad_words: msgspec.Raw = NULL
    use_beam_search: msgspec.Raw = NULL
    length_penalty: msgspec.Raw = NULL
    structured_outputs: msgspec.Raw = NULL
    guided_json: msgspec.Raw = NULL
    guided_regex: msgspec.Raw = NULL
    guided_choice: msgspec.Raw = NULL
    guided_grammar: msgspec.Raw = NULL
    response_format: msgspec.Raw = NULL
    prompt_logprobs: msgspec.Raw = NULL
    truncate_prompt_tokens: msgspec.Raw = NULL
    skip_special_tokens: msgspec.Raw = NULL
    spaces_between_special_tokens: msgspec.Raw = NULL
    include_stop_str_in_output: msgspec.Raw = NULL
    return_token_ids: msgspec.Raw = NULL
    return_tokens_as_token_ids: msgspec.Raw = NULL
    add_special_tokens: msgspec.Raw = NULL
    kv_transfer_params: msgspec.Raw = NULL


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


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One chat message; what an `openai` client sends back from an earlier answer is accepted whole."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: msgspec.Raw = NULL
    audio: msgspec.Raw = NULL
    function_call: msgspec.Raw = NULL


class ChatBody(CommonBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None

    # extensions
    chat_template_kwargs: msgspec.Raw = NULL

    # harmless
    parallel_tool_calls: msgspec.Raw = NULL

    # unsupported, see UNSUPPORTED
    tools: msgspec.Raw = NULL
    tool_choice: msgspec.Raw = NULL
    functions: msgspec.Raw = NULL
    function_call: msgspec.Raw = NULL
    audio: msgspec.Raw = NULL
    modalities: msgspec.Raw = NULL
    prediction: msgspec.Raw = NULL
    verbosity: msgspec.Raw = NULL
    web_search_options: msgspec.Raw = NULL
    chat_template: msgspec.Raw = NULL
    add_generation_prompt: msgspec.Raw = NULL
    continue_final_message: msgspec.Raw = NULL
    documents: msgspec.Raw = NULL


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
