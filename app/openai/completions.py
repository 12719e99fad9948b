"""Bodies of POST /v1/completions."""

from typing import Final

import msgspec

from app.openai.bodies import NESTED, UNSUPPORTED_COMPLETION, CompletionBody
from app.openai.decode import decode_known
from app.openai.prompt import parse_prompts
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
from app.openai.schema import Kind, Limits, ParsedRequest
from app.openai.structured import parse_structured
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Sampling

DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's, for this endpoint only."""

_DECODER: Final = msgspec.json.Decoder(CompletionBody)
_UNSUPPORTED: Final = Unsupported(UNSUPPORTED_COMPLETION)
_DEFAULT_LIMITS: Final = Limits()


def parse_completion(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ParsedRequest:
    """Raises:  InvalidRequest."""
    completion, ignored = decode_known(body, _DECODER, NESTED, is_strict=limits.has_strict_fields)
    _UNSUPPORTED.check(completion)
    max_tokens = parse_max_tokens("max_tokens", completion.max_tokens) or DEFAULT_MAX_TOKENS
    is_prewarm = parse_prewarm(completion.prompt_cache_options)
    is_streaming = bool(completion.stream)
    include_usage, has_continuous_usage = parse_stream_options(completion.stream_options, is_streaming=is_streaming)
    sampling = parse_sampling(
        completion,
        limits,
        max_tokens=max_tokens,
        logprobs=completion.logprobs,
        structured=parse_structured(completion, limits),
    )
    if completion.echo and completion.logprobs is not None:
        sampling = _with_prompt_logprobs(sampling, completion.logprobs, is_streaming=is_streaming)
    prompt, *more = parse_prompts(completion.prompt, limits)
    if more and is_prewarm:
        raise InvalidRequest("One prompt is prewarmed at a time; send a request for each.", param="prompt")
    return ParsedRequest(
        kind=Kind.COMPLETION,
        model=completion.model,
        sampling=sampling,
        max_tokens=max_tokens,
        prompt=prompt,
        more_prompts=tuple(more),
        is_streaming=is_streaming,
        include_usage=include_usage,
        has_continuous_usage=has_continuous_usage,
        has_token_ids=bool(completion.return_token_ids),
        echo=bool(completion.echo),
        bad_words=parse_bad_words(completion.bad_words, limits),
        truncate_prompt_tokens=parse_truncation(completion.truncate_prompt_tokens),
        is_prewarm=is_prewarm,
        priority=parse_priority(completion.priority, completion.service_tier),
        cache_salt=parse_cache_salt(completion.cache_salt),
        user=completion.user or "",
        num_bytes=len(body),
        slo_ttft_s=parse_seconds("slo_ttft_ms", completion.slo_ttft_ms),
        slo_itl_s=parse_seconds("slo_itl_ms", completion.slo_itl_ms),
        timeout_s=parse_seconds("timeout_ms", completion.timeout_ms),
        ignored=ignored,
    )


def _with_prompt_logprobs(sampling: Sampling, logprobs: int, *, is_streaming: bool) -> Sampling:
    """What an echoed prompt's log probabilities take: its worker must compute all of it."""
    if is_streaming:
        raise InvalidRequest(
            "'echo' together with 'logprobs' is not supported here with 'stream': true; leave one out.",
            param="echo",
            code="unsupported_parameter",
        )
    return msgspec.structs.replace(sampling, prompt_logprobs=max(logprobs, sampling.prompt_logprobs or 0))
