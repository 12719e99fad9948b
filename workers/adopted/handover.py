"""Tickets between adopted servers: what one `vllm serve` says of the blocks that it keeps, and what the other is told.

vLLM's words are passed on as they are, so that a newer one loses none of its own. What could harm an engine is checked
before: an empty list of blocks kills it, a missing word parks the request for ever (`workers/vllm/request.py`).
"""

from typing import Any

import msgspec

from planes.wire.frames import DecodeLeg, LocalLeg, PrefillLeg, Ticket
from planes.wire.messages import ADOPTED, HandoverEndpoint, HandoverMode, WorkerId
from planes.wire.unreadable import UNREADABLE
from workers.adopted.examine import ServerFacts
from workers.engine.base import EngineRequest, EngineStartError
from workers.engine.layout import layout_hash
from workers.vllm.request import FETCH, KEEP, RemoteBlocks, check_age, malformed, usable_lease_s


class KeptBlocks(RemoteBlocks, frozen=True):
    """What must be among a prefill engine's `kv_transfer_params`."""

    transfer_mode: str = "pull"

    @property
    def num_blocks(self) -> int:
        """Of the group that keeps the most."""
        return max(map(len, self.remote_block_ids), default=0)

    @property
    def num_groups(self) -> int:
        return len(self.remote_block_ids)

    def endpoint(self, server: ServerFacts) -> HandoverEndpoint:
        """Where the server hands over.  Raises:  EngineStartError if its blocks cannot be counted as ours can."""
        expected = -(-self.remote_num_tokens // server.block_size)
        if self.num_blocks != expected:
            raise EngineStartError(
                f"the server keeps {self.num_blocks} blocks of {server.block_size} for {self.remote_num_tokens} "
                f"tokens, not {expected}: this model's KV cache cannot be handed over here; take --handover none"
            )
        return HandoverEndpoint(
            HandoverMode.PULL, self.remote_engine_id, self.remote_host, self.remote_port, self.tp_size
        )


class TicketParams(msgspec.Struct, frozen=True):
    """`Ticket.params` between adopted servers."""

    written_at: float
    """Seconds since 1970 on the prefill worker's clock."""
    vllm: dict[str, Any]


def kept_blocks(params: Any) -> KeptBlocks:
    """Raises:  msgspec.ValidationError."""
    return msgspec.convert(params, KeptBlocks)


def server_layout(server: ServerFacts, num_groups: int) -> str:
    """As `workers/vllm/layout.py` of our own engines, of what a server tells. What NIXL's connector compares besides it
    finds out when two servers meet, and refuses the handover.
    """
    return layout_hash(
        {
            "engine": ADOPTED,
            "version": server.version,
            "model": server.root,
            "block_size": server.block_size,
            "cache_dtype": server.cache.get("cache_dtype", ""),
            "num_groups": num_groups,
        }
    )


def write_ticket(worker: WorkerId, params: dict[str, Any], *, lease_s: int, now: float) -> Ticket:
    """params: `kv_transfer_params` of a prefill leg's answer.  now: seconds since 1970.

    Raises:  msgspec.ValidationError.
    """
    return Ticket(
        worker=worker,
        mode=HandoverMode.PULL,
        num_tokens=kept_blocks(params).remote_num_tokens,
        lease_s=usable_lease_s(lease_s),
        params=msgspec.msgpack.encode(TicketParams(now, params)),
    )


def transfer_params(
    request: EngineRequest, *, block_size: int, num_groups: int, can_hand_over: bool, now: float
) -> dict[str, Any] | None:
    """`kv_transfer_params` of any leg; None where no KV cache changes hands.

    Args:  num_groups: KV cache groups of this server.  now: seconds since 1970.
    Raises:  InvalidRequest, TicketTooOld.
    """
    leg = request.leg
    if isinstance(leg, LocalLeg):
        return None
    if not can_hand_over or request.sampling.n > 1:
        raise malformed(f"nothing is handed over here, or not with n = {request.sampling.n}")
    if isinstance(leg, PrefillLeg):
        if leg.mode is not HandoverMode.PULL or request.resume:
            raise malformed(f"an adopted server hands over by pull, and resumes nothing then, not by {leg.mode}")
        return dict(KEEP) if request.sampling.max_tokens > 1 else None
    return _fetched(leg, request, block_size=block_size, num_groups=num_groups, now=now)


def _fetched(leg: DecodeLeg, request: EngineRequest, *, block_size: int, num_groups: int, now: float) -> dict[str, Any]:
    ticket = leg.ticket
    if ticket is None or ticket.mode is not HandoverMode.PULL:
        raise malformed("an adopted server takes KV caches by pull alone")
    if len(request.resume) > 1:
        raise malformed(f"a decode leg resumes at most 1 token, not {len(request.resume)}")
    try:
        params = msgspec.msgpack.decode(ticket.params, type=TicketParams)
        kept = kept_blocks(params.vllm)
    except UNREADABLE as exc:
        raise malformed(f"the ticket's params are malformed: {exc}") from exc
    num_tokens = len(request.prompt)
    if not kept.remote_num_tokens == ticket.num_tokens == num_tokens or kept.transfer_mode != "pull":
        raise malformed(
            f"the ticket is for {ticket.num_tokens} tokens ({kept.remote_num_tokens} in its params, to be moved by "
            f"{kept.transfer_mode}), the prompt has {num_tokens}"
        )
    expected = -(-num_tokens // block_size)
    if kept.num_groups != num_groups or kept.num_blocks != expected:
        raise malformed(
            f"the ticket lists {kept.num_blocks} blocks in {kept.num_groups} groups, {num_tokens} tokens "
            f"here have {expected} in {num_groups}"
        )
    check_age(ticket, now - params.written_at)
    return params.vllm | FETCH
