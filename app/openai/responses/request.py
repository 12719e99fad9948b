"""Bodies of POST /v1/responses: first what they say by themselves, then with the items that they refer to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from app.openai.chat import effort_kwargs, parse_template_kwargs
from app.openai.decode import check_count, check_range, decode_known, missing, shown
from app.openai.responses.bodies import (
    NESTED_RESPONSE,
    UNSUPPORTED_RESPONSE,
    Item,
    ResponseBody,
    TextFormat,
)
from app.openai.responses.items import ParsedItems, parse_input, template_messages
from app.openai.responses.tools import repeated_choice, repeated_tools, response_tools
from app.openai.sampling import (
    Unsupported,
    parse_bad_words,
    parse_cache_salt,
    parse_max_tokens,
    parse_prewarm,
    parse_priority,
    parse_sampling,
    parse_seconds,
    parse_truncation,
)
from app.openai.schema import NULL, Json, Kind, Limits, ParsedRequest
from app.openai.structured import ANY_OBJECT, json_schema, parse_structured
from planes.wire.errors import InvalidRequest
from planes.wire.frames import StructuredOutput

LOGPROBS: Final = "message.output_text.logprobs"

_DECODER: Final = msgspec.json.Decoder(ResponseBody)
_UNSUPPORTED: Final = Unsupported(UNSUPPORTED_RESPONSE)
_DEFAULT_LIMITS: Final = Limits()
_TIERS: Final = {"fast": "priority", "auto": "default"}
"""What an answer calls the tiers that are no names of their own."""
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512


@dataclass(frozen=True, slots=True, eq=False)
class ResponseRequest:
    """A body whose every field is valid by itself.

    parsed: without messages.  previous: the response that it goes on from.  repeated: what the answer says again.
    """

    parsed: ParsedRequest
    input: ParsedItems
    instructions: str | None
    previous: str | None
    is_background: bool
    is_stored: bool
    is_truncated: bool
    """Whether the conversation's beginning may be left out."""
    repeated: dict[str, Json]

    @property
    def references(self) -> list[str]:
        """Ids of items that are meant and not sent."""
        return [item.id or "" for item in self.input.items if item.kind == "item_reference"]

    def completed(
        self, earlier: Sequence[Item], referred: Mapping[str, Item], *, is_stored: bool, num_bytes: int
    ) -> ParsedRequest:
        """With the items of the conversation before, and those that are referred to by id.

        Args:  is_stored: whether the response will be kept.  num_bytes: of all these items.
        Raises:  InvalidRequest if there is nothing to answer.
        """
        items = [*earlier, *(referred.get(item.id or "", item) for item in self.input.items)]
        messages = template_messages(items, self.instructions)
        if not messages:
            raise missing("input")
        return msgspec.structs.replace(
            self.parsed,
            messages=messages,
            num_bytes=self.parsed.num_bytes + num_bytes,
            repeated=msgspec.json.encode(self.repeated | {"store": is_stored}),
        )


def parse_response(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ResponseRequest:
    """Raises:  InvalidRequest."""
    response, ignored = decode_known(body, _DECODER, NESTED_RESPONSE, is_strict=limits.has_strict_fields)
    _UNSUPPORTED.check(response)
    _check(response)
    is_background, is_stored = bool(response.background), response.store is not False
    if is_background and not is_stored:
        raise InvalidRequest(
            "'background' needs 'store': whoever asks for the response later finds it there.", param="background"
        )
    is_prewarm = parse_prewarm(response.prompt_cache_options)
    if is_background and is_prewarm:
        raise InvalidRequest(
            "'background' and 'prompt_cache_options.prewarm' do not go together: nothing is generated that could be "
            "waited for; leave 'background' out.",
            param="background",
        )
    max_tokens = parse_max_tokens("max_output_tokens", response.max_output_tokens)
    items = ParsedItems((), ()) if response.input == NULL else parse_input(response.input, limits)
    use, unserved = response_tools(response, limits)
    parsed = ParsedRequest(
        kind=Kind.RESPONSE,
        model=response.model,
        sampling=parse_sampling(
            response,
            limits,
            max_tokens=max_tokens,
            logprobs=_logprobs(response, limits),
            structured=use.structured or _structured(response, limits),
        ),
        max_tokens=max_tokens,
        template_kwargs=_template_kwargs(response, limits),
        tools=use.shown,
        parsing=use.parsing,
        is_streaming=bool(response.stream),
        bad_words=parse_bad_words(response.bad_words, limits),
        truncate_prompt_tokens=parse_truncation(response.truncate_prompt_tokens),
        is_prewarm=is_prewarm,
        priority=parse_priority(response.priority, response.service_tier),
        cache_salt=parse_cache_salt(response.cache_salt),
        user=response.user or "",
        num_bytes=len(body),
        slo_ttft_s=parse_seconds("slo_ttft_ms", response.slo_ttft_ms),
        slo_itl_s=parse_seconds("slo_itl_ms", response.slo_itl_ms),
        timeout_s=parse_seconds("timeout_ms", response.timeout_ms),
        ignored=(*ignored, *items.ignored, *unserved),
    )
    return ResponseRequest(
        parsed=parsed,
        input=items,
        instructions=response.instructions,
        previous=response.previous_response_id,
        is_background=is_background,
        is_stored=is_stored,
        is_truncated=response.truncation == "auto",
        repeated=_repeated(response),
    )


def _check(response: ResponseBody) -> None:
    if response.n not in (None, 1):
        raise InvalidRequest(f"Invalid 'n': {response.n} choices; a response has one.", param="n")
    if response.max_tokens is not None:
        raise InvalidRequest("'max_tokens' is called 'max_output_tokens' here.", param="max_tokens")
    if response.prompt_logprobs is not None or response.return_token_ids:
        name = "prompt_logprobs" if response.prompt_logprobs is not None else "return_token_ids"
        raise InvalidRequest(
            f"'{name}' is not supported in responses; leave it out.", param=name, code="unsupported_parameter"
        )
    if response.truncation not in (None, "auto", "disabled"):
        raise InvalidRequest(
            f"Invalid 'truncation': {shown(response.truncation)} is not one of auto, disabled.", param="truncation"
        )
    metadata = response.metadata or {}
    check_count("metadata", len(metadata), _MAX_METADATA, "pairs")
    for key, value in metadata.items():
        check_count("metadata", len(key), _MAX_KEY, "characters of one key")
        check_count(f"metadata.{key}", len(value), _MAX_VALUE, "characters of one value")


def _logprobs(response: ResponseBody, limits: Limits) -> int | None:
    top = response.top_logprobs
    if top is not None:
        check_range("top_logprobs", top, 0, limits.num_logprobs)
    return (top or 0) if top or LOGPROBS in (response.include or ()) else None


def _template_kwargs(response: ResponseBody, limits: Limits) -> dict[str, Json] | None:
    kwargs = parse_template_kwargs(response.chat_template_kwargs, limits)
    effort = response.reasoning.effort if response.reasoning is not None else None
    if effort is None:
        return kwargs
    return {**effort_kwargs(effort, param="reasoning.effort"), **(kwargs or {})}


def _structured(response: ResponseBody, limits: Limits) -> StructuredOutput | None:
    wanted = response.text.format if response.text is not None else None
    if wanted is None or wanted.type == "text":
        return parse_structured(response, limits)
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.type != "json_schema":
        raise InvalidRequest(
            f"Invalid 'text.format.type': {shown(wanted.type)} is not one of text, json_object, json_schema.",
            param="text.format.type",
        )
    return json_schema("text.format.schema", wanted.schema, limits)


def _repeated(response: ResponseBody) -> dict[str, Json]:
    reasoning = response.reasoning
    tier = response.service_tier or "default"
    return {
        "instructions": response.instructions,
        "metadata": response.metadata or {},
        "parallel_tool_calls": response.parallel_tool_calls is not False,
        "temperature": 1.0 if response.temperature is None else response.temperature,
        "tool_choice": repeated_choice(response),
        "tools": repeated_tools(response),
        "top_p": 1.0 if response.top_p is None else response.top_p,
        "background": bool(response.background),
        "max_output_tokens": response.max_output_tokens,
        "max_tool_calls": response.max_tool_calls,
        "previous_response_id": response.previous_response_id,
        "prompt_cache_key": response.prompt_cache_key,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "safety_identifier": response.safety_identifier,
        "service_tier": _TIERS.get(tier, tier),
        "text": _repeated_text(response),
        "top_logprobs": response.top_logprobs or 0,
        "truncation": response.truncation or "disabled",
        "user": response.user,
    }


def _repeated_text(response: ResponseBody) -> dict[str, Json]:
    options = response.text
    told: dict[str, Any] = {"format": _repeated_format(None if options is None else options.format)}
    if options is not None and options.verbosity is not None:
        told["verbosity"] = options.verbosity
    return told


def _repeated_format(wanted: TextFormat | None) -> dict[str, Json]:
    if wanted is None or wanted.type != "json_schema":
        return {"type": "text" if wanted is None else wanted.type}
    return {
        "type": "json_schema",
        "name": wanted.name or "response",
        "schema": wanted.schema,
        "description": wanted.description,
        "strict": wanted.strict,
    }
