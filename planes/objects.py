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
import json
import uuid
from datetime import UTC, datetime

import msgspec

from planes.events import EventPlane, EventPlaneUnavailable, JetStreamRefused
from planes.wire.errors import HeadraceError

_CHUNK_BYTES = 128 * 1024
_MAX_OBJECT_BYTES = 512 * 1024**2
_NO_MESSAGE, _NO_STREAM, _WRITTEN_BEFORE = 10037, 10059, 10071
"""JetStream's error codes; the last one is for a last sequence other than expected."""
_NOT_ENABLED = (10039, 10076)
"""For an account, or for the server."""


class ObjectMissing(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """The store has no object of this name."""

    code = "object_missing"


class StoreFull(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """The objects of this namespace are as many bytes as we allow them."""

    code = "store_full"

    def __init__(self, name: str, size: int, held: int, limit: int) -> None:
        super().__init__(f"no room for object {name} of {size} bytes: {held} of {limit} are in use; delete old ones")


class NoJetStream(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """NATS is there and its JetStream is not."""

    code = "no_jetstream"

    def __init__(self, reason: str) -> None:
        super().__init__(
            "NATS answers without JetStream, where model cards are kept: run nats-server with -js (headrace nats does) "
            f"or put jetstream {{}} into its configuration, and allow it to this account ({reason})"
        )


class StoreUnusable(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """There is a stream of the store's name that cannot hold it."""

    code = "store_unusable"


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
        self._is_direct = True
        """Whether the stream may be read past its leader."""
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
        if record.size > _MAX_OBJECT_BYTES:
            raise ObjectMissing(f"object {name} says it has {record.size} bytes; the limit is {_MAX_OBJECT_BYTES}")
        data, seq = bytearray(), 0
        for _ in range(record.chunks):
            chunk, seq = await self._read(self._chunks(record.nuid), seq + 1)
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
                await self._plane.jetstream(f"STREAM.PURGE.{self._stream}", {"filter": self._chunks(nuid)})
            if not (isinstance(exc, JetStreamRefused) and exc.err_code == _WRITTEN_BEFORE):
                raise

    async def _put(self, name: str, nuid: str, data: bytes) -> None:
        chunk_bytes = max(1, min(_CHUNK_BYTES, self._plane.max_message_bytes // 2))
        offsets = range(0, len(data), chunk_bytes)
        for offset in offsets:
            await self._plane.store(self._chunks(nuid), data[offset : offset + chunk_bytes])
        now = datetime.now(UTC).isoformat()
        record = _Record(name, self._bucket, nuid, len(data), len(offsets), _digest(data), now)
        only_first = {"Nats-Expected-Last-Subject-Sequence": "0"}
        await self._plane.store(self._meta(name), msgspec.json.encode(record), headers=only_first)

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
        wanted = {"seq": seq, "next_by_subj": subject}
        try:
            if not self._is_direct:
                found = (await self._plane.jetstream(f"STREAM.MSG.GET.{self._stream}", wanted))["message"]
                return base64.b64decode(found.get("data", "")), int(found["seq"])
            call = f"$JS.API.DIRECT.GET.{self._stream}"
            reply = await self._plane.request(call, json.dumps(wanted).encode(), timeout_s=5.0)
        except EventPlaneUnavailable as exc:
            if isinstance(exc, JetStreamRefused) and exc.err_code == _NO_MESSAGE:
                raise ObjectMissing(f"nothing on {subject}") from exc
            self._look_again()  # perhaps the stream is gone
            raise
        if reply.status is not None:
            self._look_again()
            raise ObjectMissing(f"nothing on {subject} (status {reply.status})")
        return reply.data, int(reply.headers["Nats-Sequence"])

    async def _ensure_bucket(self) -> None:
        if not self._is_ensured:
            try:
                self._is_direct = await self._adopt()
            except JetStreamRefused as exc:
                if exc.err_code in _NOT_ENABLED:
                    raise NoJetStream(str(exc)) from exc
                raise
            except EventPlaneUnavailable as exc:
                if self._plane.is_connected:
                    raise NoJetStream(str(exc)) from exc
                raise
            self._is_ensured = True

    async def _adopt(self) -> bool:
        """Use the stream that is there as it is, or make it.  Returns: whether it may be read directly."""
        subjects = [f"$O.{self._bucket}.C.>", f"$O.{self._bucket}.M.>"]
        try:
            config = (await self._plane.jetstream(f"STREAM.INFO.{self._stream}"))["config"]
        except JetStreamRefused as exc:
            if exc.err_code != _NO_STREAM:
                raise
            wanted = {
                "name": self._stream,
                "subjects": subjects,
                "retention": "limits",
                "discard": "new",
                "storage": "file",
                "max_bytes": -1,
                "allow_rollup_hdrs": True,
                "allow_direct": True,
            }
            config = (await self._plane.jetstream(f"STREAM.CREATE.{self._stream}", wanted))["config"]
        listening = config.get("subjects", [])
        if not all(any(_covers(pattern, subject) for pattern in listening) for subject in subjects):
            raise StoreUnusable(
                f"the stream {self._stream} takes {listening}, not {subjects}: give it these subjects, or delete it"
            )
        return bool(config.get("allow_direct", False))

    def _look_again(self) -> None:
        self._is_ensured = False  # the server may have lost its store

    def _chunks(self, nuid: str) -> str:
        return f"$O.{self._bucket}.C.{nuid}"

    def _meta(self, name: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def _digest(data: bytes | bytearray) -> str:
    return "SHA-256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()


def _covers(pattern: str, subject: str) -> bool:
    """Whether all that a subject stands for falls under a pattern, both with NATS's wildcards."""
    wide, narrow = pattern.split("."), subject.split(".")
    for index, part in enumerate(wide):
        if part == ">":
            return len(narrow) > index
        if index >= len(narrow) or narrow[index] == ">" or part not in ("*", narrow[index]):
            return False
    return len(wide) == len(narrow)
