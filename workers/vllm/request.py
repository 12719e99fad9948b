"""What a request of ours looks like to vLLM: sampling parameters and handover parameters. No vLLM needed here.

Handover parameters are checked to the last number before vLLM sees them: an empty or mismatched block list kills its
engine process, a missing key parks the request for ever, and a ticket older than its lease reads other blocks than
those it was written for.
"""

from typing import Annotated, Any

import msgspec

from planes.wire.errors import HeadraceError, InvalidRequest
from planes.wire.frames import LocalLeg, PrefillLeg, Sampling, Ticket
from planes.wire.messages import HandoverEndpoint, HandoverMode, WorkerId
from planes.wire.unreadable import UNREADABLE
from workers.engine.base import EngineRequest, is_drawn_again

_GREEDY_BELOW = 1e-5
"""vLLM samples greedily below this temperature."""

RESUME = "headrace_resume"
"""The entry of `SamplingParams.extra_args` that holds the resumed tokens: `plugin/resume.py` takes them out."""

_Natural = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Word = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class TicketTooOld(HeadraceError):  # noqa: N818 - names what is wrong
    """The prefill worker may have freed the blocks already."""

    code = "ticket_expired"


KEEP = {"do_remote_decode": True, "do_remote_prefill": False}
"""A prefill leg's `kv_transfer_params`."""
FETCH = {"do_remote_prefill": True, "do_remote_decode": False}
"""What all decode legs' say."""


class RemoteBlocks(msgspec.Struct, frozen=True):
    """What any prefill engine of vLLM says of the blocks that it keeps."""

    remote_block_ids: list[list[_Natural]]
    """One list per KV cache group."""
    remote_engine_id: _Word
    remote_request_id: _Word
    remote_host: _Word
    remote_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    tp_size: _Positive
    remote_num_tokens: _Positive


class PullParams(RemoteBlocks, frozen=True, forbid_unknown_fields=True):
    """`Ticket.params`: what our own says."""

    written_at: float
    """Seconds since 1970 on the prefill worker's clock."""
    dcp_size: _Positive = 1
    pp_size: _Positive = 1
    remote_prefill_cached_tokens: _Natural = 0


class KvGroup(msgspec.Struct, frozen=True, array_like=True):
    """One of vLLM's KV cache groups. block_bytes: over all its layers.  window: tokens it keeps, 0 for all."""

    block_bytes: int
    block_size: int
    window: int

    def num_handed_over(self, num_tokens: int) -> int:
        """Blocks in a ticket for `num_tokens` (as NIXL's connector clips a window: its blocks and one more)."""
        num_blocks = -(-num_tokens // self.block_size)
        return min(num_blocks, -(-self.window // self.block_size) + 1) if self.window else num_blocks


def usable_lease_s(lease_s: int) -> float:
    """How old a ticket may be when the decode worker gets it: its first heartbeat may take a sixth of the lease."""
    return lease_s - lease_s // 6 - 1.0


def write_ticket(worker: WorkerId, params: dict[str, Any], *, lease_s: int, cached_tokens: int, now: float) -> Ticket:
    """params: `kv_transfer_params` of a pull connector's final output.  now: seconds since 1970.

    Raises:  msgspec.ValidationError if vLLM answered something new.
    """
    known = {name: params[name] for name in PullParams.__struct_fields__ if name in params}
    pull = msgspec.convert(known | {"written_at": now}, PullParams)
    return Ticket(
        worker=worker,
        mode=HandoverMode.PULL,
        num_tokens=pull.remote_num_tokens,
        lease_s=usable_lease_s(lease_s),
        params=msgspec.msgpack.encode(pull),
        cached_tokens=cached_tokens,
    )


def pull_params(ticket: Ticket, request: EngineRequest, groups: list[KvGroup], *, now: float) -> dict[str, Any]:
    """The decode leg's `kv_transfer_params`. now: seconds since 1970.

    Raises:  InvalidRequest if anything about the ticket could harm the engine; TicketTooOld.
    """
    try:
        pull = msgspec.msgpack.decode(ticket.params, type=PullParams)
    except UNREADABLE as exc:
        raise malformed(f"the ticket's params are malformed: {exc}") from exc
    num_tokens = len(request.prompt)
    if not pull.remote_num_tokens == ticket.num_tokens == num_tokens:
        raise malformed(
            f"the ticket is for {ticket.num_tokens} tokens ({pull.remote_num_tokens} in its params), "
            f"the prompt has {num_tokens}"
        )
    counts = [len(group) for group in pull.remote_block_ids]
    expected = [group.num_handed_over(num_tokens) for group in groups]
    if counts != expected:
        raise malformed(f"the ticket lists {counts} blocks per group, {num_tokens} tokens here have {expected}")
    check_age(ticket, now - pull.written_at)
    params: dict[str, Any] = msgspec.to_builtins(pull)
    del params["written_at"]
    return params | FETCH | {"transfer_mode": "pull"}


def check_age(ticket: Ticket, age_s: float) -> None:
    """Raises:  TicketTooOld."""
    if age_s > ticket.lease_s:
        raise TicketTooOld(f"the ticket is {age_s:.1f} s old and its lease {ticket.lease_s:.1f} s")


def push_params(source: HandoverEndpoint, request: EngineRequest) -> dict[str, Any]:
    """The decode leg's `kv_transfer_params` where the prefill worker WRITEs; the request id matches the two legs.

    Raises:  InvalidRequest.
    """
    is_sound = (
        source.host and source.engine_id and 1 <= source.port <= 65535 and min(source.tp_size, source.pp_size) >= 1
    )
    if not is_sound:
        raise malformed(f"the handover's source {source.host}:{source.port} is no endpoint")
    return {
        **FETCH,
        "remote_engine_id": source.engine_id,
        "remote_request_id": request.request,
        "remote_host": source.host,
        "remote_port": source.port,
        "tp_size": source.tp_size,
        "pp_size": source.pp_size,
    }


def malformed(message: str) -> InvalidRequest:
    """What is said of a leg or a ticket that could harm the engine."""
    return InvalidRequest(message, param="leg", code="malformed_handover")


def handover_params(
    request: EngineRequest, mode: HandoverMode | None, groups: list[KvGroup], *, now: float
) -> dict[str, Any] | None:
    """`kv_transfer_params` of any leg; None where no KV cache changes hands.

    mode: what this engine was started with.  Raises:  InvalidRequest, TicketTooOld.
    """
    leg = request.leg
    if isinstance(leg, LocalLeg):
        return None
    if request.sampling.n > 1:
        raise malformed(f"n is {request.sampling.n}: only n = 1 can be handed over")
    if isinstance(leg, PrefillLeg):
        _check_mode(leg.mode, mode)
        if request.resume:
            raise malformed(f"a prefill leg resumes nothing, not {len(request.resume)} tokens")
        # An answer of one token ends here: nobody will pull. But whoever is pushed to waits already.
        is_awaited = request.sampling.max_tokens > 1 or leg.mode is HandoverMode.PUSH
        return dict(KEEP) if is_awaited else None
    if len(request.resume) > 1:
        raise malformed(f"a decode leg resumes at most 1 token, not {len(request.resume)}")
    if leg.ticket is not None:
        _check_mode(leg.ticket.mode, mode)
        return pull_params(leg.ticket, request, groups, now=now)
    if leg.source is not None:
        _check_mode(leg.source.mode, mode)
        return push_params(leg.source, request)
    raise malformed("a decode leg needs a ticket or a source")


def _check_mode(asked: HandoverMode, mode: HandoverMode | None) -> None:
    if asked is not mode:
        raise malformed(f"the handover mode is {asked}, this engine's is {mode or 'none'}")


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _GREEDY_BELOW


def sampling_arguments(request: EngineRequest, eos: list[int], *, handover: dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments of vLLM's `SamplingParams`, less what must be an object of its own (`grammars.py`).

    Args:  eos: token ids that end an answer.  handover: what `handover_params` gave.

    Stop strings are the formatter's: this engine knows no text. vLLM refuses `n > 1` with greedy sampling; all choices
    are equal then, so it is asked for one. A token that is drawn again ends by length, and so with a ticket. Resumed
    tokens count: they travel in `extra_args`.
    """
    sampling = request.sampling
    max_tokens = 1 if isinstance(request.leg, PrefillLeg) else sampling.max_tokens
    is_ending = not is_drawn_again(request.leg, sampling, num_resumed=len(request.resume))
    ignore_eos = sampling.ignore_eos or not is_ending
    stops = [*(sampling.stop_token_ids if is_ending else ()), *(() if ignore_eos else eos)]
    extra: dict[str, Any] = {}
    if handover is not None:
        extra["kv_transfer_params"] = handover
    if request.resume:
        extra[RESUME] = list(request.resume)
    return {
        "n": 1 if is_greedy(sampling) else sampling.n,
        "max_tokens": max_tokens,
        "min_tokens": min(sampling.min_tokens, max_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "stop_token_ids": sorted(set(stops)),
        "ignore_eos": ignore_eos,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": None if request.resume else sampling.prompt_logprobs,
        "logit_bias": sampling.logit_bias or None,
        "thinking_token_budget": sampling.thinking_tokens,
        "extra_args": extra or None,
        "detokenize": False,
    }


def reasoning_arguments(request: EngineRequest) -> dict[str, Any]:
    """Keyword arguments of vLLM's `generate`: where a grammar begins, if the engine has a reasoning parser."""
    parsing = request.parsing
    if parsing is None or not parsing.has_reasoning:
        return {"reasoning_ended": True}
    template: Any = msgspec.json.decode(parsing.template_kwargs) if parsing.template_kwargs else {}
    return {"reasoning_parser_kwargs": {"chat_template_kwargs": template}}
