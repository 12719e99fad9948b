"""The bodies of `POST /v1/messages` and `/v1/messages/count_tokens`.

Field names are Anthropic's; those under "extensions" are ours, as in `app/openai/schema.py`. Blocks of a conversation
are one struct with every kind's fields: which are needed is checked where a block is read (`conversation.py`).
Fields of a body are supported, harmless, or unknown, as `app/openai/bodies.py` has it; those of blocks and tools, which
grow with every release of Anthropic's, are not looked for.
"""

from typing import Final

import msgspec

from app.openai.schema import NULL, Json


class Block(msgspec.Struct, frozen=True):
    """A piece of a message's content, of any type. `cache_control` is accepted and not needed: prefixes are cached."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = NULL
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None
    source: msgspec.Raw = NULL
    title: str | None = None


class Turn(msgspec.Struct, frozen=True):
    """One message."""

    role: str
    content: str | list[Block]


class Tool(msgspec.Struct, frozen=True):
    """A function of the client's, or one of the service's own, which has a `type` and no schema."""

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Json] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name`: of the tool, with type tool."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """type: enabled, adaptive, disabled, or what newer clients send.  display: thoughts are told word for word."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    """type: json_schema."""

    type: str
    schema: msgspec.Raw = NULL


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the answer shall be like.  task_budget: no model served here is told of it."""

    effort: str | None = None
    format: OutputFormat | None = None
    task_budget: msgspec.Raw = NULL


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """user_id: the client's end user."""

    user_id: str | None = None


NESTED: Final[dict[str, type[msgspec.Struct]]] = {
    "tool_choice": ToolChoice,
    "thinking": Thinking,
    "output_config": OutputConfig,
    "metadata": Metadata,
}
"""Fields that are objects with fields of their own to know."""


class ConversationBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints take: everything that makes the prompt."""

    model: str
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    # harmless: Anthropic's clients send them, and they change nothing here
    anthropic_beta: msgspec.Raw = NULL
    cache_control: msgspec.Raw = NULL
    container: msgspec.Raw = NULL
    context_management: msgspec.Raw = NULL
    diagnostics: msgspec.Raw = NULL
    inference_geo: msgspec.Raw = NULL
    service_tier: msgspec.Raw = NULL
    speed: msgspec.Raw = NULL
    user_profile_id: msgspec.Raw = NULL
    workspace_id: msgspec.Raw = NULL


class MessageBody(ConversationBody, frozen=True, kw_only=True):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None

    # extensions
    seed: int | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    timeout_ms: float | None = None
