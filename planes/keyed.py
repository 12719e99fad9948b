"""Values by key, for a while: a JetStream key-value bucket whose oldest values make room for new ones.

    $KV.{bucket}.{key}                   the value, or its beginning and how many pieces follow
    $KV.{bucket}.{key}.{version}.{n}     piece n of a value that is longer than a message may be

A value may be replaced; whoever reads gets the old one whole or the new one. What the server has dropped a piece of is
missing as a whole. Keys are tokens of NATS subjects, joined by dots (`subject_token`).
"""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from planes.bucket import Bucket
from planes.events import EventPlane, Inbox
from planes.wire.errors import HeadraceError

_PIECE_BYTES = 256 * 1024
_PIECES, _VERSION = "Headrace-Pieces", "Headrace-Version"


class ValueTooLarge(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """Longer than one value may be."""

    code = "value_too_large"

    def __init__(self, num_bytes: int, limit: int) -> None:
        super().__init__(f"a value of {num_bytes} bytes; the limit for one is {limit}")


class KeyedStore:
    """The values of one kind in one namespace. Every method raises what `Bucket`'s do.

    ttl_s: how long a value is kept after it was written last.  max_bytes: of all together; the oldest make room.
    max_value_bytes: of one.
    """

    def __init__(self, plane: EventPlane, kind: str, *, ttl_s: float, max_bytes: int, max_value_bytes: int) -> None:
        name = f"headrace-{plane.namespace}-{kind}"
        self._subject = f"$KV.{name}"
        self.max_value_bytes = max_value_bytes
        config = {
            "name": f"KV_{name}",
            "subjects": [f"{self._subject}.>"],
            "retention": "limits",
            "discard": "old",
            "storage": "file",
            "max_age": round(ttl_s * 1e9),
            "duplicate_window": round(min(120.0, ttl_s) * 1e9),
            "max_bytes": max_bytes,
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "allow_direct": True,
        }
        self._bucket = Bucket(plane, config, what=kind)

    async def check(self) -> None:
        """That values can be kept now."""
        await self._bucket.ensure()

    async def get(self, key: str) -> bytes:
        """Raises:  ObjectMissing."""
        value, _, headers = await self._bucket.read(f"{self._subject}.{key}")
        num_pieces = int(headers.get(_PIECES, 0))
        if not num_pieces:
            return value
        pieces = [value]
        for place in range(num_pieces):
            piece, _, _ = await self._bucket.read(f"{self._subject}.{key}.{headers[_VERSION]}.{place}")
            pieces.append(piece)
        return b"".join(pieces)

    async def put(self, key: str, value: bytes) -> None:
        """Raises:  ValueTooLarge."""
        if len(value) > self.max_value_bytes:
            raise ValueTooLarge(len(value), self.max_value_bytes)
        size = self.piece_bytes
        pieces = [value[start : start + size] for start in range(size, len(value), size)]
        headers = None
        if pieces:
            headers = {_PIECES: str(len(pieces)), _VERSION: uuid.uuid4().hex}
            for place, piece in enumerate(pieces):
                await self._bucket.write(f"{self._subject}.{key}.{headers[_VERSION]}.{place}", piece)
        await self._bucket.write(f"{self._subject}.{key}", value[:size], headers)

    async def delete(self, prefix: str) -> None:
        """Every value whose key begins with `prefix` and a dot."""
        await self._bucket.purge(f"{self._subject}.{prefix}.>")

    async def next(self, prefix: str, after: int = 0) -> tuple[bytes, int]:
        """Of the values in one piece whose keys are `prefix`, a dot and a token: the first written after number
        `after`, and its number.

        Raises:  ObjectMissing.
        """
        value, number, _ = await self._bucket.read(f"{self._subject}.{prefix}.*", after + 1)
        return value, number

    @property
    def piece_bytes(self) -> int:
        """How long a value in one piece may be."""
        return self._bucket.piece_bytes(_PIECE_BYTES)

    @asynccontextmanager
    async def changes(self, prefix: str) -> AsyncIterator[Inbox]:
        """Hears of every value that is written under keys that begin with `prefix` and a dot."""
        async with self._bucket.plane.inbox(f"{self._subject}.{prefix}.>") as inbox:
            yield inbox
