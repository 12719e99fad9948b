"""Handover of simulated KV caches over NIXL: real bytes between the block pools of two engines.

The agents have no progress thread, which would spin or, at its slowest, wake two thousand times a second. Instead,
whoever has something in flight polls, every half to four milliseconds, two seconds after it ever more slowly, and an
idle engine does nothing at all. That is enough for every transport of UCX, TCP included, because both ends know of a
handover: the prefill side polls while it has offers that may be READ, the decode side while it waits.

The only module that imports NIXL.
"""

import asyncio
import importlib
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from planes.wire.errors import InvalidRequest
from planes.wire.messages import HandoverEndpoint, HandoverMode
from workers.nixl_wheel import installed_wheel
from workers.sim.counting_transfer import CountingTransfer
from workers.sim.handover import Handovers, KvTransfer, Offer
from workers.sim.kv_pool import KvPool
from workers.sim.side_channel import Announcement, Caller, HandoverFailed, Peer, Written, answer_from, asking

_log = structlog.get_logger()

_MIN_POLL_S, _MAX_POLL_S, _LINGER_POLL_S = 0.0005, 0.004, 0.032
_LINGER_S = 2.0
"""Polling goes on for so long after the last transfer, ever more slowly, because its notification may still be on its
way out: NIXL does not say, and agents that meet for the first time need several turns of both."""
_MAX_PEERS = 1024
_TAKEN, _WRITTEN = "taken", "written"


def open_transfer(
    pool: KvPool, *, mode: HandoverMode, engine_id: str, host: str, bind_host: str = "", port: int = 0
) -> KvTransfer:
    """NIXL if it is installed; if not, that is logged. Arguments as `Handovers` takes them."""
    if installed_wheel() is not None:
        return NixlTransfer(pool, mode=mode, engine_id=engine_id, host=host, bind_host=bind_host, port=port)
    _log.warning("handover.counted", reason="NIXL is not installed: bytes of KV cache are counted, not moved")
    return CountingTransfer(pool, mode=mode, engine_id=engine_id, host=host, bind_host=bind_host, port=port)


class NixlTransfer(Handovers):
    """READs (pull) and WRITEs (push) between registered pools."""

    def __init__(
        self, pool: KvPool, *, mode: HandoverMode, engine_id: str, host: str, bind_host: str = "", port: int = 0
    ) -> None:
        """Raises:  OSError if NIXL cannot start."""
        super().__init__(pool, mode=mode, engine_id=engine_id, host=host, bind_host=bind_host, port=port)
        nixl = importlib.import_module(f"{installed_wheel()}._api")  # optional, and half a second to import
        if "NIXL_LOG_LEVEL" not in os.environ:
            logging.getLogger("nixl").setLevel(logging.WARNING)
        bindings = vars(nixl.nixlBind).values()
        known = (value for value in bindings if isinstance(value, type) and issubclass(value, Exception))
        self._errors: tuple[type[Exception], ...] = (RuntimeError, *known)
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._base = pool.data.ctypes.data
        try:
            self._agent: Any = nixl.nixl_agent(engine_id, config)
            self._registered = self._agent.register_memory([(self._base, pool.data.nbytes, 0, "")], "DRAM")
        except self._errors as exc:
            raise OSError(f"NIXL cannot start: {exc}") from exc
        self._self = Peer(self._agent.get_agent_metadata(), self._base, pool.num_blocks)
        self._peers: OrderedDict[str, str] = OrderedDict()
        self._moving: dict[asyncio.Future[None], Any] = {}
        self._expected: dict[str, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._interval_s = _MIN_POLL_S
        self._linger_until = 0.0

    async def stop(self) -> None:
        for future in [*self._moving, *self._expected.values()]:
            if not future.done():
                future.set_exception(HandoverFailed("the engine stops"))
        await super().stop()
        self._offers.clear()
        for future in list(self._moving):
            self._drop(future)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for name in self._peers.values():
            self._disconnect(name)
        try:
            self._agent.deregister_memory(self._registered)
        except self._errors as exc:
            _log.debug("handover.deregister_failed", reason=str(exc))

    def offer(self, request: str, blocks: Sequence[int], on_taken: Any) -> bytes:
        params = super().offer(request, blocks, on_taken)
        self._poll_soon()
        return params

    # --- what a handover is made of ------------------------------------------------------------------------------

    def _describe(self, request: str, blocks: Sequence[int]) -> Offer:
        packed = np.asarray(blocks, dtype="<u4").tobytes()
        return Offer(*self._address(), request, packed, self._pool.bytes_per_block, peer=self._self)

    def _peer(self) -> Peer:
        return self._self

    def _check_offer(self, offer: Offer) -> None:
        if offer.peer is None:
            raise InvalidRequest("the ticket is of a prefill worker without NIXL; this one has it", param="ticket")
        last_block = int(np.frombuffer(offer.blocks, dtype="<u4").max())
        if last_block >= offer.peer.num_blocks:
            message = f"the ticket names block {last_block}; the prefill worker has {offer.peer.num_blocks}"
            raise InvalidRequest(message, param="ticket")

    async def _pull(self, offer: Offer, blocks: Sequence[int]) -> None:
        if offer.peer is None:
            raise HandoverFailed("the ticket is of a prefill worker without NIXL")
        name = self._connect(offer.engine_id, offer.peer)
        message = f"{_TAKEN}:{offer.request}".encode()
        theirs = np.frombuffer(offer.blocks, dtype="<u4")
        if not blocks:
            self._notify(name, message)
            return
        done = self._move("READ", blocks, name, offer.peer.base, theirs[len(theirs) - len(blocks) :], message)
        try:
            await done
        finally:
            self._drop(done)

    def _write(self, request: str, blocks: list[int], announcement: Announcement, caller: Caller) -> None:
        if announcement.peer is None:
            raise HandoverFailed("the decode worker has no NIXL; this one has")
        if not blocks:
            caller.answer(Written())
            self._done(request)
            return
        name = self._connect(announcement.sender, announcement.peer)
        theirs = np.frombuffer(announcement.blocks, dtype="<u4")
        message = f"{_WRITTEN}:{request}".encode()
        done = self._move("WRITE", blocks, name, announcement.peer.base, theirs, message)
        done.add_done_callback(partial(self._wrote, request, caller))

    def _wrote(self, request: str, caller: Caller, done: "asyncio.Future[None]") -> None:
        self._drop(done)
        error = done.exception()
        if error is None:
            self._done(request)
        else:
            self._failed(request, caller, str(error))

    async def _await_push(self, source: HandoverEndpoint, question: Announcement) -> None:
        written = asyncio.get_running_loop().create_future()
        self._expected[question.request] = written
        try:
            async with asking(source.host, source.port, question) as reader:
                self._poll_soon()
                hearing = asyncio.ensure_future(answer_from(reader))
                try:
                    await asyncio.wait((written, hearing), return_when=asyncio.FIRST_COMPLETED)
                    if not written.done():
                        hearing.result()
                    else:
                        written.result()
                finally:
                    hearing.cancel()
                    await asyncio.gather(hearing, return_exceptions=True)
        finally:
            del self._expected[question.request]

    # --- NIXL ----------------------------------------------------------------------------------------------------

    def _connect(self, engine_id: str, peer: Peer) -> str:
        """The agent's name of a peer, introduced on first contact."""
        name = self._peers.get(engine_id)
        if name is None:
            try:
                added = self._agent.add_remote_agent(peer.metadata)
            except self._errors as exc:
                raise HandoverFailed(f"NIXL does not know what to make of engine {engine_id}: {exc}") from exc
            name = added.decode() if isinstance(added, bytes) else str(added)
            self._peers[engine_id] = name
            if len(self._peers) > _MAX_PEERS:
                self._disconnect(self._peers.popitem(last=False)[1])
        self._peers.move_to_end(engine_id)
        return name

    def _disconnect(self, name: str) -> None:
        try:
            self._agent.remove_remote_agent(name)
        except self._errors as exc:
            _log.debug("handover.disconnect_failed", reason=str(exc))

    def _lost(self, name: str) -> None:
        """Meet the peer anew next time."""
        for engine_id in [known for known, its_name in self._peers.items() if its_name == name]:
            del self._peers[engine_id]
            self._disconnect(name)

    def _move(
        self,
        operation: str,
        ours: Sequence[int],
        name: str,
        base: int,
        theirs: npt.NDArray[np.uint32],
        message: bytes,
    ) -> "asyncio.Future[None]":
        """Begin a transfer. Raises:  HandoverFailed."""
        try:
            handle = self._agent.initialize_xfer(
                operation,
                self._descriptors(self._base, np.asarray(ours, dtype=np.uint64)),
                self._descriptors(base, theirs.astype(np.uint64)),
                name,
                message,
            )
            state = self._agent.transfer(handle)
        except self._errors as exc:
            self._lost(name)
            raise HandoverFailed(f"NIXL cannot {operation} {len(ours)} blocks, peer {name}: {exc}") from exc
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._moving[done] = handle
        self._settle(done, state, name)
        self._poll_soon()
        return done

    def _descriptors(self, base: int, blocks: npt.NDArray[np.uint64]) -> Any:
        size = np.uint64(self._pool.bytes_per_block)
        rows = np.zeros((len(blocks), 3), dtype=np.uint64)
        rows[:, 0] = np.uint64(base) + blocks * size
        rows[:, 1] = size
        return self._agent.get_xfer_descs(rows, "DRAM")

    def _notify(self, name: str, message: bytes) -> None:
        try:
            self._agent.send_notif(name, message)
        except self._errors as exc:
            self._lost(name)
            raise HandoverFailed(f"NIXL cannot notify peer {name}: {exc}") from exc
        self._poll_soon()

    def _settle(self, done: "asyncio.Future[None]", state: str, reason: str) -> bool:
        if state == "DONE" and not done.done():
            done.set_result(None)
        elif state == "ERR" and not done.done():
            done.set_exception(HandoverFailed(f"NIXL gave up the transfer: {reason}"))
        return state != "PROC"

    def _drop(self, done: "asyncio.Future[None]") -> None:
        """Free a transfer; one that is still under way is broken off."""
        handle = self._moving.pop(done, None)
        if handle is not None:
            try:
                handle.release()
            except self._errors as exc:
                _log.warning("handover.release_failed", reason=str(exc))

    # --- polling -------------------------------------------------------------------------------------------------

    def _poll_soon(self) -> None:
        loop = asyncio.get_running_loop()
        self._linger_until = loop.time() + _LINGER_S
        self._interval_s = _MIN_POLL_S
        if self._timer is None:
            self._timer = loop.call_later(self._interval_s, self._poll)

    def _poll(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        if self._advance():
            self._interval_s = _MIN_POLL_S
            self._linger_until = loop.time() + _LINGER_S
        else:
            self._interval_s = min(2 * self._interval_s, _LINGER_POLL_S)
        is_offering = bool(self._offers) and self._endpoint.mode is HandoverMode.PULL
        is_awaited = bool(self._moving or is_offering or self._expected)
        if is_awaited:
            self._interval_s = min(self._interval_s, _MAX_POLL_S)
        if is_awaited or loop.time() < self._linger_until:
            self._timer = loop.call_later(self._interval_s, self._poll)

    def _advance(self) -> bool:
        """Let NIXL work, and pass on what it has done. Returns whether there was any."""
        has_news = False
        for done, handle in list(self._moving.items()):
            try:
                state, reason = self._agent.check_xfer_state(handle), "the peer may be gone"
            except self._errors as exc:
                state, reason = "ERR", str(exc)
            has_news |= self._settle(done, state, reason)
        for messages in self._agent.get_new_notifs().values():
            has_news = True
            for message in messages:
                self._notified(message.decode(errors="replace"))
        return has_news

    def _notified(self, message: str) -> None:
        kind, _, request = message.partition(":")
        written = self._expected.get(request)
        if kind == _TAKEN:
            self._done(request)
        elif kind == _WRITTEN and written is not None and not written.done():
            written.set_result(None)
