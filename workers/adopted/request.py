"""What a request of ours is to `POST /inference/v1/generate` of an unmodified `vllm serve`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from planes.wire.errors import UNSUPPORTED, InvalidRequest
from planes.wire.frames import DecodeLeg, PrefillLeg, StructuredOutput
from workers.engine.base import EngineRequest
from workers.vllm.request import reasoning_arguments, sampling_arguments

_MOST_LOGPROBS = 20
"""What a server allows that was told nothing else (`--max-logprobs`)."""


def is_streamed(request: EngineRequest) -> bool:
    """Tickets and the prompt's log probabilities are in whole answers alone."""
    return not isinstance(request.leg, PrefillLeg) and request.sampling.prompt_logprobs is None


def drawn_again(request: EngineRequest) -> int | None:
    """The token that the client has from the prefill worker: a decode leg draws it once more, and it is left out."""
    return request.resume[0] if isinstance(request.leg, DecodeLeg) and request.resume else None


def as_prompt(request: EngineRequest) -> EngineRequest:
    """The same with the tokens that it resumes as part of its prompt: a server has no other way to go on from them.

    Exact where nothing depends on which tokens are the answer's (`planes.wire.frames.needs_own_tokens`).
    """
    num_resumed, sampling = len(request.resume), request.sampling
    return replace(
        request,
        prompt=np.concatenate([request.prompt, np.array(request.resume, dtype=np.uint32)]),
        sampling=msgspec.structs.replace(
            sampling,
            max_tokens=sampling.max_tokens - num_resumed,
            min_tokens=max(0, sampling.min_tokens - num_resumed),
            prompt_logprobs=None if num_resumed else sampling.prompt_logprobs,
        ),
        resume=(),
    )


def generate_body(
    request: EngineRequest, eos: list[int], handover: dict[str, Any] | None, vocabulary: Sequence[bytes]
) -> dict[str, Any]:
    """JSON for the server.

    Args:  eos: token ids that end an answer.  handover: `kv_transfer_params`.  vocabulary: what each token spells.
    Raises:  InvalidRequest.
    """
    request = replace(request, resume=()) if isinstance(request.leg, DecodeLeg) else as_prompt(request)
    sampling = sampling_arguments(request, eos, handover=None)
    if request.sampling.logprobs:
        # Of the likeliest the server tells one less where the token itself is not among them.
        sampling["logprobs"] = max(request.sampling.logprobs, min(request.sampling.logprobs + 1, _MOST_LOGPROBS))
    if request.sampling.bad_words:
        sampling["bad_words"] = _spelt(request.sampling.bad_words, vocabulary)
    if request.sampling.structured is not None:
        sampling["structured_outputs"] = _structured(request.sampling.structured)
    body = {
        "request_id": request.request,
        "token_ids": request.prompt.tolist(),
        "sampling_params": {name: value for name, value in sampling.items() if value is not None},
        "priority": request.priority,
        "stream": is_streamed(request),
        **reasoning_arguments(request),
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if request.cache_salt:
        body["cache_salt"] = request.cache_salt
    if handover is not None:
        body["kv_transfer_params"] = handover
    return body


def _structured(structured: StructuredOutput) -> dict[str, Any]:
    """vLLM's `structured_outputs`; the field that is set says the kind."""
    if structured.json_schema:
        return {"json": structured.json_schema}
    set_fields: dict[str, Any] = msgspec.to_builtins(structured)  # those that are not empty
    return set_fields


def _spelt(bad_words: list[list[int]], vocabulary: Sequence[bytes]) -> list[str]:
    """The server takes texts, and makes of each the tokens that the gateway has made."""
    words = [b"".join(vocabulary[token] for token in tokens) for tokens in bad_words]
    try:
        return sorted({word.decode().lstrip() for word in words} - {""})
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"a bad word is no text: {exc}", param="bad_words", code=UNSUPPORTED) from exc
