"""What vLLM says of a request, in our words. No vLLM needed here: its objects are read by their attributes."""

from dataclasses import dataclass
from typing import Any

from planes.wire.frames import DecodeLeg, FinishReason
from workers.engine.base import EngineOutput, EngineRequest, TokenLogprob

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a decode leg's KV cache came."""

    seconds: float = 0.0
    num_bytes: int = 0


NO_ARRIVAL = Arrival()


def translate(
    request: EngineRequest, output: Any, choice: Any, index: int, *, is_first: bool, arrival: Arrival
) -> EngineOutput:
    """One output of vLLM's as one of ours.

    Args:  output, choice: vLLM's RequestOutput and one of its outputs.  index: the choice of ours that it stands for.
    is_first: it is the first output of choice 0.
    """
    tokens = tuple(choice.token_ids)
    logprobs: tuple[TokenLogprob, ...] = ()
    if choice.logprobs:
        num_top = request.sampling.logprobs or 0
        logprobs = tuple(map(_token_logprob, tokens, choice.logprobs, [num_top] * len(tokens)))
    ending = choice.finish_reason
    if ending is None and not is_first:
        return EngineOutput(index, tokens, logprobs)
    finish = None if ending is None else _FINISH.get(ending, FinishReason.ERROR)
    is_decode = isinstance(request.leg, DecodeLeg)
    is_pushed = isinstance(request.leg, DecodeLeg) and request.leg.source is not None
    stats = output.metrics
    waited_s = max(stats.scheduled_ts - stats.queued_ts, 0.0)
    return EngineOutput(
        index,
        tokens,
        logprobs,
        finish,
        cached_tokens=0 if is_pushed else output.num_cached_tokens,
        queue_s=max(waited_s - arrival.seconds, 0.0),
        prefill_s=0.0 if is_decode else max(stats.first_token_ts - stats.scheduled_ts, 0.0),
        handover_s=arrival.seconds,
        handover_bytes=arrival.num_bytes,
        decode_s=max(stats.last_token_ts - stats.first_token_ts, 0.0),
        prompt_logprobs=_prompt_logprobs(request, output) if is_first else (),
        error=f"vLLM ended the request with {ending!r}" if finish is FinishReason.ERROR else "",
    )


def _prompt_logprobs(request: EngineRequest, output: Any) -> tuple[TokenLogprob | None, ...]:
    """vLLM gives a dictionary a token, and None for the first one."""
    if not output.prompt_logprobs:
        return ()
    num_top = request.sampling.prompt_logprobs or 0
    return tuple(
        None if ranked is None else _token_logprob(token, ranked, num_top)
        for token, ranked in zip(request.prompt.tolist(), output.prompt_logprobs, strict=True)
    )


def _token_logprob(token: int, ranked: dict[int, Any], num_top: int) -> TokenLogprob:
    """ranked: token id → vLLM's Logprob, of the sampled token and of the most likely ones."""
    top = sorted(((other, entry.logprob) for other, entry in ranked.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token, ranked[token].logprob, tuple(top[:num_top]), ranked[token].rank)
