"""The last gate before an engine: whatever could make it fail, or wait for something that never comes, stops here.

The only place where a worker checks lengths and tokens. What is in a ticket only its engine can read.
"""

import math
from collections.abc import Collection, Iterable
from itertools import chain

import numpy as np
import numpy.typing as npt

from planes.wire.errors import ROLE_CHANGED, InvalidRequest, Rejected
from planes.wire.frames import DecodeLeg, Generate, Leg, LocalLeg, PrefillLeg, Sampling
from planes.wire.messages import EngineFacts, HandoverEndpoint, HandoverMode, Role
from workers.answer.dialects import KINDS
from workers.engine.base import EngineRequest
from workers.structured import check_structured

EMBEDDING = "embedding"
"""The kind of answer that is no text."""
MAX_BAD_WORDS = 1000
"""vLLM looks at each of them for each token."""


class RoleRefused(Rejected):
    """This worker's role does not do what it was asked for: the gateway has not heard of a change yet."""

    code = ROLE_CHANGED

    def __init__(self, leg: Leg, role: Role | None) -> None:
        is_what = "changes" if role is None else f"is {role}"
        super().__init__(f"a {type(leg).__name__} came to a worker whose role {is_what}")


class AdapterMissing(Rejected):
    """This worker has not loaded the request's adapter, or has forgotten it."""

    code = "adapter_missing"

    def __init__(self, name: str) -> None:
        super().__init__(f"the adapter {name!r} is not loaded here")


class HandoverRefused(Rejected):
    """This worker cannot play the part in a handover that the gateway gave it; another route may do."""

    code = "handover_refused"


def admit(
    request: Generate,
    *,
    role: Role | None,
    facts: EngineFacts,
    endpoint: HandoverEndpoint | None,
    adapters: Collection[int] = (),
) -> EngineRequest:
    """What the engine may be given for `request`.

    Args:  role: None while it takes nothing.  adapters: numbers of those loaded.
    Raises:  InvalidRequest for a request that no engine like this one can run; RoleRefused, AdapterMissing,
    HandoverRefused.
    """
    if role is None or not is_for(role, request.leg):
        raise RoleRefused(request.leg, role)
    if request.adapter is not None and request.adapter.number not in adapters:
        raise AdapterMissing(request.adapter.name)
    prompt = _prompt(request.prompt, facts)
    resume = tuple(_tokens(request.resume, "resume", facts).tolist())
    _tokens(request.sampling.script, "script", facts)
    _check_sampling(request.sampling, facts)
    is_embedding = request.format.kind == EMBEDDING
    _check_length(len(prompt), 0 if is_embedding else request.sampling.max_tokens, facts)
    _check_answer(request, num_resumed=len(resume))
    _check_task(request, facts)
    if not isinstance(request.leg, LocalLeg):
        _check_leg(request.leg, endpoint, num_tokens=len(prompt) + len(resume))
        if request.sampling.n > 1:
            raise InvalidRequest(f"n is {request.sampling.n}: a handover serves one choice", param="n")
        if request.sampling.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs are computed where the answer is", param="prompt_logprobs")
    return EngineRequest(
        request=request.request,
        prompt=prompt,
        sampling=request.sampling,
        leg=request.leg,
        resume=resume,
        cache_salt=request.cache_salt,
        priority=request.priority,
        is_embedding=is_embedding,
        adapter=request.adapter,
        parsing=request.format.parsing,
    )


def _prompt(packed: bytes, facts: EngineFacts) -> npt.NDArray[np.uint32]:
    prompt = _tokens(packed, "prompt", facts)
    if not len(prompt):
        raise InvalidRequest("the prompt has no tokens; at least 1 is needed", param="prompt", code="empty_prompt")
    return prompt


def _tokens(packed: bytes, param: str, facts: EngineFacts) -> npt.NDArray[np.uint32]:
    if len(packed) % 4:
        raise InvalidRequest(f"{param} takes {len(packed)} bytes; packed tokens take 4 each", param=param)
    tokens = np.frombuffer(packed, dtype="<u4")
    if len(tokens) and (largest := int(tokens.max())) >= facts.vocab_size:
        raise InvalidRequest(
            f"{param} has token {largest}; the vocabulary ends at {facts.vocab_size - 1}",
            param=param,
            code="unknown_token",
        )
    return tokens


def _check_sampling(sampling: Sampling, facts: EngineFacts) -> None:
    """Ranges are the gateway's to check; here only what an engine would choke on."""
    if not 1 <= sampling.n <= facts.max_batch:
        raise InvalidRequest(f"n is {sampling.n}; 1 to {facts.max_batch} are possible here", param="n")
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {sampling.max_tokens}; at least 1 is needed", param="max_tokens")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {sampling.min_tokens}; 0 to max_tokens, {sampling.max_tokens}, are possible",
            param="min_tokens",
        )
    _check_token_ids(sampling, facts)
    if "" in sampling.stop:
        raise InvalidRequest("stop has an empty string; a stop string has at least 1 character", param="stop")
    _check_bad_words(sampling.bad_words)
    if sampling.thinking_tokens is not None and sampling.thinking_tokens < 0:
        raise InvalidRequest(
            f"thinking_tokens is {sampling.thinking_tokens}; at least 0 is needed", param="thinking_token_budget"
        )
    if sampling.structured is not None:
        check_structured(sampling.structured)


def _check_token_ids(sampling: Sampling, facts: EngineFacts) -> None:
    lists: tuple[tuple[str, Iterable[int]], ...] = (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
        ("bad_words", chain.from_iterable(sampling.bad_words)),
    )
    for param, tokens in lists:
        for token in tokens:
            if not 0 <= token < facts.vocab_size:
                raise InvalidRequest(
                    f"{param} has token {token}; the vocabulary is 0 to {facts.vocab_size - 1}", param=param
                )


def _check_bad_words(bad_words: list[list[int]]) -> None:
    if len(bad_words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words has {len(bad_words)} token sequences; {MAX_BAD_WORDS} are possible", param="bad_words"
        )
    if [] in bad_words:
        raise InvalidRequest("bad_words has an empty sequence; one has at least 1 token", param="bad_words")


def _check_length(prompt_tokens: int, max_tokens: int, facts: EngineFacts) -> None:
    """max_tokens: 0 for a vector, which takes none of the context."""
    if not max_tokens and prompt_tokens > facts.context_length:
        raise InvalidRequest(
            f"the input has {prompt_tokens} tokens; the context holds {facts.context_length}",
            param="input",
            code="context_length_exceeded",
        )
    if prompt_tokens + max_tokens > facts.context_length:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
            f"{prompt_tokens + max_tokens}; the context holds {facts.context_length}",
            param="max_tokens",
            code="context_length_exceeded",
        )


def _check_answer(request: Generate, *, num_resumed: int) -> None:
    if request.format.kind not in (*KINDS, EMBEDDING):
        raise InvalidRequest(f"format.kind is {request.format.kind!r}; {' or '.join(KINDS)} is possible")
    if not (math.isfinite(request.timeout_s) and request.timeout_s >= 0):
        raise InvalidRequest(f"timeout_s is {request.timeout_s}; a number of seconds is needed")
    if num_resumed and request.sampling.n > 1:
        raise InvalidRequest(f"n is {request.sampling.n}: only a single choice can be resumed", param="n")
    is_told_late = request.sampling.logprobs is not None or request.sampling.prompt_logprobs is not None
    if num_resumed and is_told_late and not request.format.is_streaming:
        raise InvalidRequest(
            f"the log probabilities of {num_resumed} resumed tokens are lost; start this answer again instead",
            code="resume_without_logprobs",
        )


def _check_task(request: Generate, facts: EngineFacts) -> None:
    is_embedding = request.format.kind == EMBEDDING
    if is_embedding != (facts.embedding_size > 0):
        raise InvalidRequest(f"format.kind is {request.format.kind!r}; this worker's vectors: {facts.embedding_size}")
    if is_embedding and (request.sampling.n > 1 or request.resume or not isinstance(request.leg, LocalLeg)):
        raise InvalidRequest("a vector is made by one worker, once, from a prompt alone")


def is_for(role: Role, leg: Leg) -> bool:
    """Whether a worker of this role runs such legs."""
    return role.can_prefill if isinstance(leg, PrefillLeg) else role.can_decode


def _check_leg(leg: PrefillLeg | DecodeLeg, endpoint: HandoverEndpoint | None, *, num_tokens: int) -> None:
    if endpoint is None:
        raise HandoverRefused("this worker's engine hands no KV cache over")
    mode = _mode(leg)
    if mode is not endpoint.mode:
        raise HandoverRefused(f"the handover mode is {mode or 'missing'}; this worker's is {endpoint.mode}")
    if isinstance(leg, DecodeLeg) and leg.ticket is not None and not 1 <= leg.ticket.num_tokens <= num_tokens:
        raise HandoverRefused(f"the ticket is for {leg.ticket.num_tokens} tokens; the prompt has {num_tokens}")
    if isinstance(leg, DecodeLeg) and leg.source is not None and not (leg.source.host and 0 < leg.source.port < 65536):
        raise HandoverRefused(f"the source of the handover is {leg.source.host!r}:{leg.source.port}")


def _mode(leg: PrefillLeg | DecodeLeg) -> HandoverMode | None:
    """None if a decode leg says neither whom to pull from nor who will push, or both."""
    if isinstance(leg, PrefillLeg):
        return leg.mode
    if (leg.ticket is None) == (leg.source is None):
        return None
    return leg.ticket.mode if leg.ticket is not None else HandoverMode.PUSH
