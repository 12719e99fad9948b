"""The shape of the bodies of POST /v1/responses and /v1/responses/input_tokens.

As `app/openai/bodies.py`: a field is supported, harmless or unsupported, and what is none of these is ignored and named
in the answer's head.
"""

from typing import Final

import msgspec

from app.openai.bodies import NESTED, UNSUPPORTED, CommonBody
from app.openai.schema import NULL, Json


class Reasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much to think. Thoughts are told word for word, so what a summary should be like changes nothing."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class TextFormat(msgspec.Struct, frozen=True):
    """What the text must match."""

    type: str
    name: str | None = None
    schema: msgspec.Raw = NULL
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """verbosity: no model served here is told of it."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ToolOption(msgspec.Struct, frozen=True):
    """One of `tools`, of whatever type."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Json] | None = None
    strict: bool | None = None
    format: dict[str, Json] | None = None


class ToolName(msgspec.Struct, frozen=True):
    """One of the tools that may be called."""

    type: str = "function"
    name: str | None = None


class ToolChoiceObject(msgspec.Struct, frozen=True):
    """A `tool_choice` that is no word."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[ToolName] | None = None


class ResponseBody(CommonBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/responses. `input` stays as it came until its items are looked at."""

    input: msgspec.Raw = NULL
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[ToolOption] | None = None
    tool_choice: str | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    include: list[str] | None = None
    background: bool | None = None
    store: bool | None = None  # type: ignore[assignment]  # here it has an effect
    metadata: dict[str, str] | None = None  # type: ignore[assignment]  # this, and the next two, are repeated
    prompt_cache_key: str | None = None  # type: ignore[assignment]
    safety_identifier: str | None = None  # type: ignore[assignment]
    max_tool_calls: int | None = None
    """Of tools that the server runs itself; there are none."""

    # extensions
    chat_template_kwargs: msgspec.Raw = NULL

    # harmless
    background_options: msgspec.Raw = NULL
    image: msgspec.Raw = NULL
    access_programs: msgspec.Raw = NULL
    personality: msgspec.Raw = NULL

    # unsupported, see UNSUPPORTED_RESPONSE
    conversation: msgspec.Raw = NULL
    prompt: msgspec.Raw = NULL
    context_management: msgspec.Raw = NULL
    moderation: msgspec.Raw = NULL


class Part(msgspec.Struct, frozen=True):
    """A piece of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, frozen=True):
    """One of `input`, of whatever type; what the types have in common is read, the rest is not looked at."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: msgspec.Raw = NULL
    input: str | None = None
    output: msgspec.Raw = NULL
    summary: list[Part] | None = None

    @property
    def kind(self) -> str:
        """Its type, said or not."""
        return self.type or ("message" if self.role is not None else "item_reference")


NESTED_RESPONSE: Final[dict[str, type[msgspec.Struct]]] = NESTED | {"reasoning": Reasoning, "text": TextOptions}

UNSUPPORTED_RESPONSE: Final[dict[str, tuple[Json, ...]]] = UNSUPPORTED | {
    "add_special_tokens": (False,),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "response_format": (),
}
