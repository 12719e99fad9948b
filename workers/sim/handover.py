"""What every kind of handover between simulated engines shares: offers, announcements, who waits for whom.

pull: the prefill engine offers (`offer`, in the ticket), the decode engine takes (`receive`) and tells that it has.
push: the decode engine announces its blocks (`receive`, over `side_channel.py`), the prefill engine writes them when it
has offered the same request.

`transfer.py` moves real bytes over NIXL; `counting_transfer.py` stands in for it where NIXL is not installed.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import structlog

from planes.wire.errors import InvalidRequest
from planes.wire.messages import HandoverEndpoint, HandoverMode
from planes.wire.unreadable import UNREADABLE
from workers.sim.kv_pool import KvPool
from workers.sim.side_channel import (
    Announcement,
    Caller,
    HandoverFailed,
    Listener,
    Peer,
    Question,
    Refused,
    Taken,
    Written,
)

_log = structlog.get_logger()

_MAX_ANNOUNCEMENTS = 4096


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """What a ticket's `params` say: where the KV cache of one prompt lies."""

    engine_id: str
    host: str
    port: int
    request: str
    blocks: bytes
    """Packed little-endian uint32, in prompt order."""
    bytes_per_block: int
    peer: Peer | None = None
    words: bytes = b""
    """Without NIXL: what the blocks hold (packed uint64)."""

    @property
    def num_blocks(self) -> int:
        return len(self.blocks) // 4


class KvTransfer(Protocol):
    """One engine's part in handovers, of both roles."""

    @property
    def pool(self) -> KvPool: ...

    @property
    def endpoint(self) -> HandoverEndpoint:
        """Valid after `start`."""

    async def start(self) -> None:
        """Listen. Raises:  OSError."""

    def offer(self, request: str, blocks: Sequence[int], on_taken: Callable[[], None]) -> bytes:
        """Prefill side: these blocks hold the request's prompt; they must stay as they are until `on_taken` or
        `withdraw`. Returns the ticket's `params`.
        """

    def withdraw(self, request: str) -> bool:
        """The lease is over. False: a WRITE is reading the blocks right now; `on_taken` will come."""

    def parse(self, params: bytes) -> Offer:
        """Raises:  InvalidRequest if they are no params of an engine like this one."""

    async def receive(
        self, source: Offer | HandoverEndpoint, request: str, blocks: Sequence[int], total: int, *, timeout_s: float
    ) -> None:
        """Decode side: get the last `len(blocks)` of the request's `total` blocks into these ones.

        Cancelling it ends the transfer, too.  Raises:  HandoverFailed.
        """

    async def stop(self) -> None:
        """End everything in flight."""


@dataclass(slots=True)
class _Offered:
    blocks: list[int]
    on_taken: Callable[[], None]
    is_writing: bool = False


class Handovers(ABC):
    """One engine's offers and announcements; a `KvTransfer` once the abstract methods say how bytes move."""

    def __init__(
        self, pool: KvPool, *, mode: HandoverMode, engine_id: str, host: str, bind_host: str = "", port: int = 0
    ) -> None:
        """
        Args:  engine_id: must be new at every start.  host: where others reach us.  bind_host: where to listen; empty:
        `host`.  port: 0 takes a free one.
        """
        self._pool = pool
        self._endpoint = HandoverEndpoint(mode, engine_id, host, port)
        self._bind_host = bind_host or host
        self._listener = Listener(self._asked, self._hung_up)
        self._offers: dict[str, _Offered] = {}
        self._announced: dict[str, tuple[Announcement, Caller]] = {}

    @property
    def pool(self) -> KvPool:
        return self._pool

    @property
    def endpoint(self) -> HandoverEndpoint:
        return self._endpoint

    async def start(self) -> None:
        port = await self._listener.start(self._bind_host, self._endpoint.port)
        self._endpoint = msgspec.structs.replace(self._endpoint, port=port)

    async def stop(self) -> None:
        for _, caller in self._announced.values():
            caller.answer(Refused("the prefill worker stops"))
        await self._listener.stop()

    def offer(self, request: str, blocks: Sequence[int], on_taken: Callable[[], None]) -> bytes:
        self._offers[request] = _Offered(list(blocks), on_taken)
        self._match(request)
        return msgspec.msgpack.encode(self._describe(request, blocks))

    def withdraw(self, request: str) -> bool:
        offered = self._offers.get(request)
        if offered is not None and offered.is_writing:
            return False
        self._offers.pop(request, None)
        announced = self._announced.pop(request, None)
        if announced is not None:
            announced[1].answer(Refused(f"request {request} was given up by the prefill worker"))
        return True

    def parse(self, params: bytes) -> Offer:
        try:
            offer = msgspec.msgpack.decode(params, type=Offer)
        except (*UNREADABLE, ValueError) as exc:
            raise InvalidRequest(f"the ticket's params are malformed: {exc}", param="ticket") from exc
        if not offer.blocks or len(offer.blocks) % 4:
            raise InvalidRequest(f"the ticket names its blocks in {len(offer.blocks)} bytes", param="ticket")
        if offer.bytes_per_block != self._pool.bytes_per_block:
            message = f"the ticket's blocks have {offer.bytes_per_block} bytes; ours have {self._pool.bytes_per_block}"
            raise InvalidRequest(message, param="ticket")
        self._check_offer(offer)
        return offer

    async def receive(
        self, source: Offer | HandoverEndpoint, request: str, blocks: Sequence[int], total: int, *, timeout_s: float
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(source, Offer):
                    await self._pull(source, blocks)
                else:
                    packed = np.asarray(blocks, dtype="<u4").tobytes()
                    size, us = self._pool.bytes_per_block, self._endpoint.engine_id
                    question = Announcement(source.engine_id, request, total, packed, size, us, self._peer())
                    await self._await_push(source, question)
        except TimeoutError as exc:
            message = f"no KV cache of request {request} came from engine {source.engine_id} within {timeout_s:g} s"
            raise HandoverFailed(message) from exc

    # --- the prefill side of the side channel ----------------------------------------------------------------------

    def _asked(self, question: Question, caller: Caller) -> None:
        if question.engine_id != self._endpoint.engine_id:
            reason = f"engine {question.engine_id} is gone; this is {self._endpoint.engine_id}"
            caller.answer(Refused(reason))
        elif isinstance(question, Taken):
            self._done(question.request)
            caller.answer(Written())
        elif len(self._announced) >= _MAX_ANNOUNCEMENTS:
            caller.answer(Refused(f"{len(self._announced)} handovers are announced and that is the limit"))
        elif question.bytes_per_block != self._pool.bytes_per_block:
            theirs, ours = question.bytes_per_block, self._pool.bytes_per_block
            caller.answer(Refused(f"the announced blocks have {theirs} bytes; ours have {ours}"))
        else:
            self._announced[question.request] = (question, caller)
            self._match(question.request)

    def _hung_up(self, question: Question, caller: Caller) -> None:
        announced = self._announced.get(question.request)
        if announced is not None and announced[1] is caller:
            del self._announced[question.request]

    def _match(self, request: str) -> None:
        """Push: a request that was both offered and announced is written."""
        offered, announced = self._offers.get(request), self._announced.get(request)
        if offered is None or announced is None or offered.is_writing:
            return
        announcement, caller = announced
        count = len(announcement.blocks) // 4
        if announcement.total != len(offered.blocks) or count > announcement.total:
            total = len(offered.blocks)
            caller.answer(Refused(f"{count} of {announcement.total} blocks were announced; the prompt has {total}"))
            return
        offered.is_writing = True
        try:
            self._write(request, offered.blocks[announcement.total - count :], announcement, caller)
        except HandoverFailed as exc:
            self._failed(request, caller, str(exc))

    def _done(self, request: str) -> None:
        offered = self._offers.pop(request, None)
        if offered is not None:
            offered.on_taken()

    def _failed(self, request: str, caller: Caller, reason: str) -> None:
        """The WRITE failed: the lease goes on, for whoever asks next."""
        if request in self._offers:
            self._offers[request].is_writing = False
        caller.answer(Refused(reason))
        _log.warning("handover.failed", request_id=request, reason=reason)

    def _address(self) -> tuple[str, str, int]:
        return self._endpoint.engine_id, self._endpoint.host, self._endpoint.port

    def _peer(self) -> Peer | None:
        """How NIXL reaches our pool; None without NIXL."""
        return None

    # --- what differs ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _describe(self, request: str, blocks: Sequence[int]) -> Offer: ...

    @abstractmethod
    def _check_offer(self, offer: Offer) -> None:
        """Raises:  InvalidRequest."""

    @abstractmethod
    def _write(self, request: str, blocks: list[int], announcement: Announcement, caller: Caller) -> None:
        """Push, prefill side: move `blocks` to where they were announced, then call `_done` or `_failed`."""

    @abstractmethod
    async def _pull(self, offer: Offer, blocks: Sequence[int]) -> None:
        """Get the offer's last blocks into ours, and tell the prefill side."""

    @abstractmethod
    async def _await_push(self, source: HandoverEndpoint, question: Announcement) -> None:
        """Announce, and wait until our blocks are written."""
