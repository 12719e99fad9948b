"""Bodies of POST /v1/embeddings, and of its answers."""

import base64
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from app.openai.decode import check_range, decode_known, shown
from app.openai.prompt import parse_prompts
from app.openai.sampling import parse_cache_salt, parse_priority, parse_seconds, parse_truncation
from app.openai.schema import NULL, Kind, Limits, ParsedRequest
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Sampling

MOST_INPUTS: Final = 2048
"""OpenAI's."""
_FORMATS: Final = ("float", "base64")
_DEFAULT_LIMITS: Final = Limits()


class EmbeddingBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's fields, and as extensions vLLM's and ours. null means the same as leaving the field out."""

    model: str
    input: msgspec.Raw
    """See `app/openai/prompt.py`."""
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None

    # extensions
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout_ms: float | None = None

    # harmless
    request_id: msgspec.Raw = NULL


class ToEmbed(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """dimensions: numbers of each vector that are wanted; None: all."""

    parsed: ParsedRequest
    is_base64: bool = False
    dimensions: int | None = None


_EMBEDDING: Final = msgspec.json.Decoder(EmbeddingBody)


def parse_embedding(body: bytes, limits: Limits = _DEFAULT_LIMITS) -> ToEmbed:
    """Raises:  InvalidRequest."""
    asked, ignored = decode_known(body, _EMBEDDING, {}, is_strict=limits.has_strict_fields)
    encoding = asked.encoding_format or "float"
    if encoding not in _FORMATS:
        raise InvalidRequest(
            f"Invalid 'encoding_format': {shown(encoding)} is not one of {', '.join(_FORMATS)}.",
            param="encoding_format",
        )
    if asked.dimensions is not None:
        check_range("dimensions", asked.dimensions, 1, 2**31 - 1)
    prompt, *more = parse_prompts(asked.input, limits, name="input", most=MOST_INPUTS)
    parsed = ParsedRequest(
        kind=Kind.EMBEDDING,
        model=asked.model,
        sampling=Sampling(max_tokens=0),
        max_tokens=1,
        prompt=prompt,
        more_prompts=tuple(more),
        truncate_prompt_tokens=parse_truncation(asked.truncate_prompt_tokens),
        cache_salt=parse_cache_salt(asked.cache_salt),
        priority=parse_priority(asked.priority, None),
        timeout_s=parse_seconds("timeout_ms", asked.timeout_ms),
        user=asked.user or "",
        num_bytes=len(body),
        ignored=ignored,
    )
    return ToEmbed(parsed=parsed, is_base64=encoding == "base64", dimensions=asked.dimensions)


def embedding_body(model: str, vectors: Sequence[bytes], asked: ToEmbed, *, prompt_tokens: int) -> bytes:
    """OpenAI's answer.  vectors: float32, little-endian, as workers gave them."""
    data = [
        {"object": "embedding", "index": index, "embedding": _shown(vector, asked)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})


def _shown(vector: bytes, asked: ToEmbed) -> str | list[float]:
    """Its first numbers, if no more are wanted, are brought to length 1 again."""
    numbers = np.frombuffer(vector, dtype="<f4")
    if asked.dimensions is not None:
        numbers = numbers[: asked.dimensions]
        numbers = (numbers / max(float(np.linalg.norm(numbers)), 1e-12)).astype("<f4")
    return base64.b64encode(numbers.tobytes()).decode() if asked.is_base64 else numbers.tolist()
