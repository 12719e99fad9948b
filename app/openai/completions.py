"""Bodies of POST /v1/completions."""

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from app.openai.chat import parse_stream_options
from app.openai.decode import check_range, decode, shown
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
        prompt=_prompt(completion.prompt),
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


def _prompt(prompt: str | list[int | str | list[int]]) -> str | npt.NDArray[np.uint32]:
    """A list of one prompt is that prompt; several prompts in one request are refused."""
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise InvalidRequest("Invalid 'prompt': it must not be an empty list.", param="prompt")
    first = prompt[0]
    if isinstance(first, int):
        return _token_ids(prompt)
    if len(prompt) > 1:
        raise InvalidRequest(
            f"Invalid 'prompt': {len(prompt)} prompts were given and the limit is 1; send a request for each.",
            param="prompt",
        )
    return first if isinstance(first, str) else _token_ids(list(first))


def _token_ids(tokens: list[int | str | list[int]]) -> npt.NDArray[np.uint32]:
    if not tokens:
        raise InvalidRequest("Invalid 'prompt': it must hold at least one token id.", param="prompt")
    ids = [token for token in tokens if isinstance(token, int)]
    if len(ids) != len(tokens):
        other = next(token for token in tokens if not isinstance(token, int))
        raise InvalidRequest(
            f"Invalid 'prompt': it mixes token ids with {shown(other)}; send only ids or only text.",
            param="prompt",
            code="invalid_type",
        )
    check_range("prompt", min(ids), 0, 2**32 - 1)
    check_range("prompt", max(ids), 0, 2**32 - 1)
    return np.array(ids, dtype=np.uint32)
