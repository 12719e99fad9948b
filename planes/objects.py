"""Write-once objects in NATS JetStream's object store, in its format (ADR-20 of nats-architecture-and-design).

An object is a row of chunks on one subject and one record on another that says how many there are. Whoever writes the
record first has stored the object, everybody else withdraws: objects here are named by their content, so it is the
same. Not nats-py's own store: that replaces an object under its readers, and one who misses a chunk waits for ever.
"""

import base64
import hashlib
import json
import uuid
from datetime import UTC, datetime

import msgspec

from planes.events import EventPlane, JetStreamRefused
from planes.wire.errors import HeadraceError

_CHUNK_BYTES = 128 * 1024
_WRITTEN_BEFORE = 10071
"""JetStream's error code for a last sequence other than expected."""


class ObjectMissing(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """The store has no object of this name."""

    code = "object_missing"


class StoreFull(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """The objects of this namespace are as many bytes as we allow them."""

    code = "store_full"

    def __init__(self, name: str, size: int, held: int, limit: int) -> None:
        super().__init__(f"no room for object {name} of {size} bytes: {held} of {limit} are in use; delete old ones")


class _Record(msgspec.Struct, frozen=True):
    """What the store says about an object. `nuid` names its chunks."""

    name: str
    bucket: str
    nuid: str
    size: int
    chunks: int
    digest: str
    mtime: str = ""


class ObjectStore:
    """The objects of one namespace. Every method raises EventPlaneUnavailable, after 5 s without an answer."""

    def __init__(self, plane: EventPlane, *, max_bytes: int = 4 * 1024**3) -> None:
        self._plane = plane
        self._bucket = f"headrace-{plane.namespace}"
        self._stream = f"OBJ_{self._bucket}"
        self._max_bytes = max_bytes
        self._is_ensured = False
        plane.on_connect(self._look_again)

    async def has(self, name: str) -> bool:
        """Whether an object of this name is stored, whole."""
        try:
            await self._record(name)
        except ObjectMissing:
            return False
        return True

    async def get(self, name: str) -> bytes:
        """The object, checked against the store's digest.  Raises:  ObjectMissing."""
        record = await self._record(name)
        data, seq = bytearray(), 0
        for _ in range(record.chunks):
            chunk, seq = await self._read(self._chunks(record.nuid), seq + 1)
            data += chunk
        if record.digest != _digest(data):
            raise ObjectMissing(f"object {name} is damaged: {len(data)} bytes of {record.size}, and another digest")
        return bytes(data)

    async def put(self, name: str, data: bytes) -> None:
        """Store it, unless there is one of that name already; several may do so at once.  Raises:  StoreFull."""
        if await self.has(name):
            return
        await self._check_room(name, len(data))
        nuid = uuid.uuid4().hex
        offsets = range(0, len(data), _CHUNK_BYTES)
        for offset in offsets:
            await self._plane.store(self._chunks(nuid), data[offset : offset + _CHUNK_BYTES])
        now = datetime.now(UTC).isoformat()
        record = _Record(name, self._bucket, nuid, len(data), len(offsets), _digest(data), now)
        only_first = {"Nats-Expected-Last-Subject-Sequence": "0"}
        try:
            await self._plane.store(self._meta(name), msgspec.json.encode(record), headers=only_first)
        except JetStreamRefused as exc:
            if exc.err_code != _WRITTEN_BEFORE:
                raise
            await self._plane.jetstream(f"STREAM.PURGE.{self._stream}", {"filter": self._chunks(nuid)})

    async def _check_room(self, name: str, size: int) -> None:
        """The limit is ours to keep: JetStream would take one off the disk at once, for every namespace."""
        info = await self._plane.jetstream(f"STREAM.INFO.{self._stream}")
        held = int(info["state"]["bytes"])
        if held + size > self._max_bytes:
            raise StoreFull(name, size, held, self._max_bytes)

    async def _record(self, name: str) -> _Record:
        await self._ensure_bucket()
        value, _ = await self._read(self._meta(name), 1)
        try:
            return msgspec.json.decode(value, type=_Record)
        except msgspec.DecodeError as exc:
            raise ObjectMissing(f"the record of object {name} is malformed: {exc}") from exc

    async def _read(self, subject: str, seq: int) -> tuple[bytes, int]:
        """The first message on `subject` from `seq` on, and its number."""
        wanted = json.dumps({"seq": seq, "next_by_subj": subject}).encode()
        reply = await self._plane.request(f"$JS.API.DIRECT.GET.{self._stream}", wanted, timeout_s=5.0)
        if reply.status is not None:
            raise ObjectMissing(f"nothing on {subject} (status {reply.status})")
        return reply.data, int(reply.headers["Nats-Sequence"])

    async def _ensure_bucket(self) -> None:
        if self._is_ensured:
            return
        await self._plane.ensure_stream(
            {
                "name": self._stream,
                "subjects": [f"$O.{self._bucket}.C.>", f"$O.{self._bucket}.M.>"],
                "retention": "limits",
                "discard": "new",
                "storage": "file",
                "max_bytes": -1,
                "allow_rollup_hdrs": True,
                "allow_direct": True,
            }
        )
        self._is_ensured = True

    def _look_again(self) -> None:
        self._is_ensured = False  # the server may have lost its store

    def _chunks(self, nuid: str) -> str:
        return f"$O.{self._bucket}.C.{nuid}"

    def _meta(self, name: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def _digest(data: bytes | bytearray) -> str:
    return "SHA-256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
