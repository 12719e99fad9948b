"""vLLM's KV events, in Headrace's block names.

vLLM names a block by the last 64 bits of a sha256 chain, Headrace by `wire/blocks.py`. A stored block carries its
tokens and its parent, so its name follows from the parent's; `EventTranslator` keeps the names of the blocks that the
engine holds, no more. In a hybrid model every layer group reports the same blocks once more: only the first group with
full attention counts, because its longest prefix bounds what the others can serve.

`EventReader` receives the events. Our own vLLM's publisher connects to it, so it hears everything from the first event
on; to one that runs already it connects itself, and asks for what was said before. Should one be lost nevertheless it
asks vLLM's replay endpoint, and if that has forgotten too it reports a cleared cache: the gateways then expect less
than is there, and learn the rest as blocks are stored again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import structlog

from planes.wire.blocks import continue_names, pack, root
from planes.wire.messages import AllCleared, BlocksRemoved, BlocksStored, KvEvent
from planes.wire.unreadable import UNREADABLE

_log = structlog.get_logger()

_WINDOWED = frozenset({"sliding_window", "sliding_window_mla", "chunked_local_attention", "mamba"})
"""Kinds of groups that hold only part of a prefix."""

_VllmHash = int | bytes
"""Bytes where `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`."""


class _Stored(msgspec.Struct, frozen=True, tag="BlockStored"):
    block_hashes: list[_VllmHash]
    parent_block_hash: _VllmHash | None
    token_ids: list[int]
    block_size: int
    extra_keys: list[list[Any] | None] | None = None
    lora_name: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(msgspec.Struct, frozen=True, tag="BlockRemoved"):
    block_hashes: list[_VllmHash]
    group_idx: int | None = None


class _Cleared(msgspec.Struct, frozen=True, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, frozen=True, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]


_decode = msgspec.msgpack.Decoder(_Batch).decode


@dataclass(slots=True)
class _CachedBlock:
    """A block that the engine holds. copies: physical blocks with the same content (equal prompts at the same time)."""

    name: int
    depth: int
    copies: int = 1


class EventTranslator:
    """Translates the event batches of one engine, in order. model: the name that clients use."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._cached: dict[_VllmHash, _CachedBlock] = {}
        self._group: int | None = None

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def translate(self, payload: bytes) -> list[KvEvent]:
        """Raises:  msgspec.DecodeError if `payload` is no event batch of vLLM's."""
        events: list[KvEvent] = []
        for event in _decode(payload).events:
            match event:
                case _Stored():
                    names = self._stored(event)
                    if names:
                        events.append(BlocksStored(_packed(names)))
                case _Removed():
                    names = self._removed(event)
                    if names:
                        events.append(BlocksRemoved(_packed(names)))
                case _Cleared():
                    events.extend(self.clear())
        return events

    def clear(self) -> list[KvEvent]:
        """Forget everything cached; what is stored later under a forgotten parent has no name and is left out."""
        self._cached.clear()
        return [AllCleared()]

    def _counts(self, event: _Stored) -> bool:
        if self._group is None and event.kv_cache_spec_kind not in _WINDOWED:
            self._group = event.group_idx or 0
        return (event.group_idx or 0) == self._group

    def _stored(self, event: _Stored) -> list[int]:
        """Names that were not cached before."""
        if not event.block_hashes or not self._counts(event):
            return []
        if event.parent_block_hash is None:
            parent, depth = root(self._model, _salt(event), event.lora_name or ""), 0
        else:
            before = self._cached.get(event.parent_block_hash)
            if before is None:
                return []
            parent, depth = before.name, before.depth
        tokens = np.array(event.token_ids, dtype=np.uint32)
        names: list[int] = continue_names(parent, depth, tokens, event.block_size).tolist()
        if len(names) != len(event.block_hashes):
            return []  # a partly filled block: nobody can ask for it by name
        new = []
        for offset, (block, name) in enumerate(zip(event.block_hashes, names, strict=True), start=1):
            if (cached := self._cached.get(block)) is not None:
                cached.copies += 1
            else:
                self._cached[block] = _CachedBlock(name, depth + offset)
                new.append(name)
        return new

    def _removed(self, event: _Removed) -> list[int]:
        """Names of which no copy is left."""
        if (event.group_idx or 0) != self._group:
            return []
        gone = []
        for block in event.block_hashes:
            cached = self._cached.get(block)
            if cached is None:
                continue
            cached.copies -= 1
            if cached.copies == 0:
                del self._cached[block]
                gone.append(cached.name)
        return gone


def _salt(event: _Stored) -> str:
    """A first block's extra keys are its adapter's name, where it has one, and its cache salt; there are no images."""
    first = (event.extra_keys or [None])[0] or []
    salts = first[1:] if event.lora_name else first
    return str(salts[-1]) if salts else ""


def _packed(names: Sequence[int]) -> bytes:
    return pack(np.array(names, dtype=np.uint64))


def translate_all(translator: EventTranslator, payloads: Iterable[bytes | None]) -> list[KvEvent]:
    """Of batches in order; None: one that nobody knows. What is stored after it is held, whatever was said in it.

    One that cannot be read is as if nobody knew it: an adopted server may be of any version.
    """
    events: list[KvEvent] = []
    for payload in payloads:
        if payload is not None:
            try:
                events += translator.translate(payload)
                continue
            except UNREADABLE as exc:
                _log.warning("kv_events.unreadable", num_bytes=len(payload), reason=str(exc))
        events = translator.clear()
    return events


class EventReader:
    """Receives event batches from vLLM's publisher and calls `on_events`, in order, on the event loop."""

    def __init__(self, translator: EventTranslator, replay_endpoint: str, *, publisher: str = "") -> None:
        """
        Args:  replay_endpoint: where vLLM will bind its replay socket, e.g. `ipc:///…`; "": nowhere.
        publisher: where it has bound its publisher; "": that will connect to us.
        """
        import zmq  # noqa: PLC0415 - comes with vLLM, which not every installation has
        import zmq.asyncio  # noqa: PLC0415

        self._zmq = zmq
        self._translator = translator
        self._replay_endpoint = replay_endpoint
        self._expected = 0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(100_000)
        self._socket.subscribe(b"")
        self.endpoint = publisher
        """Where vLLM's publisher is, or shall connect."""
        if publisher:
            self._socket.connect(publisher)
        else:
            self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"

    async def run(self, on_events: Callable[[list[KvEvent]], None]) -> None:
        """Read until cancelled."""
        while True:
            _, number, payload = await self._socket.recv_multipart()
            seq = int.from_bytes(number, "big")
            if seq > self._expected:
                self._emit(await self._recovered(seq), on_events)
            if seq >= self._expected:
                self._emit(translate_all(self._translator, [payload]), on_events)
                self._expected = seq + 1

    async def _recovered(self, seq: int) -> list[KvEvent]:
        """What was said from the expected batch up to `seq`, exclusive; a cleared cache if nobody knows any more."""
        missing = seq - self._expected
        try:
            payloads = await self._replayed() if self._replay_endpoint else {}
        except self._zmq.Again:
            payloads = {}
        wanted = [payloads.get(number) for number in range(self._expected, seq)]
        self._expected = seq
        if num_lost := wanted.count(None):
            _log.warning("kv_events.lost", num_batches=num_lost)
        else:
            _log.info("kv_events.replayed", num_batches=missing)
        return translate_all(self._translator, wanted)

    async def _replayed(self) -> dict[int, bytes]:
        """Raises:  zmq.Again if vLLM does not answer in time."""
        payloads: dict[int, bytes] = {}
        with self._context.socket(self._zmq.DEALER) as socket:
            socket.set(self._zmq.RCVTIMEO, 5000)
            socket.set(self._zmq.LINGER, 0)
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", self._expected.to_bytes(8, "big")])
            while True:
                _, _, number, payload = await socket.recv_multipart()
                if not payload:
                    return payloads
                payloads[int.from_bytes(number, "big")] = payload

    @staticmethod
    def _emit(events: list[KvEvent], on_events: Callable[[list[KvEvent]], None]) -> None:
        if events:
            on_events(events)

    def close(self) -> None:
        self._context.destroy(linger=0)
