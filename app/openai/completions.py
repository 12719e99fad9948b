"""Bodies of POST /v1/completions."""

from typing import Final

import msgspec

from app.openai.chat import parse_stream_options
from app.openai.decode import decode
from app.openai.prompt import parse_prompt
from app.openai.sampling import (
    Unsupported,
    parse_cache_salt,
    parse_max_tokens,
    parse_priority,
    parse_sampling,
    parse_seconds,
)
from app.openai.schema import UNSUPPORTED_COMPLETION, CompletionBody, Kind, Limits, ParsedRequest
from planes.wire.errors import InvalidRequest

DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's, for this endpoint only."""

_DECODER: Final = msgspec.json.Decoder(CompletionBody)
_UNSUPPORTED: Final = Unsupported(UNSUPPORTED_COMPLETION)
_DEFAULT_LIMITS: Final = Limits()


def parse_completion(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ParsedRequest:
    """Raises:  InvalidRequest."""
    completion = decode(body, _DECODER)
    _UNSUPPORTED.check(completion)
    max_tokens = parse_max_tokens("max_tokens", completion.max_tokens) or DEFAULT_MAX_TOKENS
    if completion.echo and completion.logprobs is not None:
        raise InvalidRequest(
            "'echo' together with 'logprobs' is not supported here: log probabilities of the prompt are not computed.",
            param="echo",
            code="unsupported_parameter",
        )
    return ParsedRequest(
        kind=Kind.COMPLETION,
        model=completion.model,
        sampling=parse_sampling(completion, limits, max_tokens=max_tokens, logprobs=completion.logprobs),
        max_tokens=max_tokens,
        prompt=parse_prompt(completion.prompt),
        is_streaming=bool(completion.stream),
        include_usage=parse_stream_options(completion.stream_options, is_streaming=bool(completion.stream)),
        echo=bool(completion.echo),
        priority=parse_priority(completion.priority),
        cache_salt=parse_cache_salt(completion.cache_salt),
        user=completion.user or "",
        num_bytes=len(body),
        slo_ttft_s=parse_seconds("slo_ttft_ms", completion.slo_ttft_ms),
        timeout_s=parse_seconds("timeout_ms", completion.timeout_ms),
    )
