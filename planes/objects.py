"""Write-once objects in NATS JetStream's object store, in its format (ADR-20 of nats-architecture-and-design).

An object is a row of chunks on one subject and one record on another that says how many there are. Whoever writes the
record first has stored the object, everybody else withdraws: objects here are named by their content, so it is the
same. Not nats-py's own store: that replaces an object under its readers, and one who misses a chunk waits for ever.

The server may be somebody else's. A stream that is there is used as it has been set up, in pieces that the server
takes; one that is gone is made anew. Whoever stores looks again from time to time whether it is still there.
"""

import base64
import contextlib
import hashlib
import uuid
from datetime import UTC, datetime

import msgspec

from planes.bucket import Bucket, ObjectMissing
from planes.events import EventPlane, EventPlaneUnavailable, JetStreamRefused
from planes.wire.errors import HeadraceError
from planes.wire.unreadable import UNREADABLE

_CHUNK_BYTES = 128 * 1024
_MAX_OBJECT_BYTES = 512 * 1024**2
_WRITTEN_BEFORE = 10071
"""JetStream's error code for a last sequence other than expected."""


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
    """The objects of one namespace. Every method raises what `Bucket`'s do."""

    def __init__(self, plane: EventPlane, *, max_bytes: int = 4 * 1024**3) -> None:
        self._name = f"headrace-{plane.namespace}"
        self._max_bytes = max_bytes
        config = {
            "name": f"OBJ_{self._name}",
            "subjects": [f"$O.{self._name}.C.>", f"$O.{self._name}.M.>"],
            "retention": "limits",
            "discard": "new",
            "storage": "file",
            "max_bytes": -1,
            "allow_rollup_hdrs": True,
            "allow_direct": True,
        }
        self._bucket = Bucket(plane, config, what="model cards")

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
        if record.size > _MAX_OBJECT_BYTES:
            raise ObjectMissing(f"object {name} says it has {record.size} bytes; the limit is {_MAX_OBJECT_BYTES}")
        data, seq = bytearray(), 0
        for _ in range(record.chunks):
            chunk, seq, _headers = await self._bucket.read(self._chunks(record.nuid), seq + 1)
            data += chunk
            if len(data) > record.size:
                break
        if record.digest != _digest(data):
            raise ObjectMissing(f"object {name} is damaged: {len(data)} bytes of {record.size}, and another digest")
        return bytes(data)

    async def put(self, name: str, data: bytes) -> None:
        """Store it, unless there is one of that name already; several may do so at once.  Raises:  StoreFull."""
        if await self.has(name):
            return
        await self._check_room(name, len(data))
        nuid = uuid.uuid4().hex
        try:
            await self._put(name, nuid, data)
        except EventPlaneUnavailable as exc:
            with contextlib.suppress(EventPlaneUnavailable):  # pieces that no record names
                await self._bucket.purge(self._chunks(nuid))
            if not (isinstance(exc, JetStreamRefused) and exc.err_code == _WRITTEN_BEFORE):
                raise

    async def _put(self, name: str, nuid: str, data: bytes) -> None:
        chunk_bytes = self._bucket.piece_bytes(_CHUNK_BYTES)
        offsets = range(0, len(data), chunk_bytes)
        for offset in offsets:
            await self._bucket.write(self._chunks(nuid), data[offset : offset + chunk_bytes])
        now = datetime.now(UTC).isoformat()
        record = _Record(name, self._name, nuid, len(data), len(offsets), _digest(data), now)
        only_first = {"Nats-Expected-Last-Subject-Sequence": "0"}
        await self._bucket.write(self._meta(name), msgspec.json.encode(record), only_first)

    async def _check_room(self, name: str, size: int) -> None:
        """The limit is ours to keep: JetStream would take one off the disk at once, for every namespace."""
        held = await self._bucket.num_bytes()
        if held + size > self._max_bytes:
            raise StoreFull(name, size, held, self._max_bytes)

    async def _record(self, name: str) -> _Record:
        value, _, _ = await self._bucket.read(self._meta(name))
        try:
            return msgspec.json.decode(value, type=_Record)
        except UNREADABLE as exc:
            raise ObjectMissing(f"the record of object {name} is malformed: {exc}") from exc

    def _chunks(self, nuid: str) -> str:
        return f"$O.{self._name}.C.{nuid}"

    def _meta(self, name: str) -> str:
        return f"$O.{self._name}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def _digest(data: bytes | bytearray) -> str:
    return "SHA-256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
