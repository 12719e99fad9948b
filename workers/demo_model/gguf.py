"""The header of a GGUF file: its fields, and where its tensors lie. Source of the format: ggml's `docs/gguf.md`."""

import mmap
import struct
from dataclasses import dataclass
from typing import Any

from planes.wire.errors import HeadraceError


class GgufMalformed(HeadraceError):  # noqa: N818 - names what is wrong
    """It is no GGUF file that is read here; the message says why."""

    code = "gguf_malformed"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. shape: as in torch, outermost first.  kind: ggml's number of the quantisation."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """A GGUF file's header."""

    fields: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


class _Cursor:
    """Reads GGUF's little-endian values one after the other."""

    def __init__(self, data: "mmap.mmap | bytes") -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("I"), self.scalar("Q")
            return [self.value(item) for _ in range(count)]
        return self.scalar(_SCALARS[kind])


def read_gguf(data: "mmap.mmap | bytes") -> Gguf:
    """Raises:  GgufMalformed if `data` is no GGUF file of version 2 or 3."""
    if data[:4] != b"GGUF":
        raise GgufMalformed(f"a GGUF file begins with b'GGUF', this one with {data[:4]!r}")
    cursor = _Cursor(data)
    cursor.at = 4
    version, num_tensors, num_fields = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
    if version not in (2, 3):
        raise GgufMalformed(f"GGUF version {version} is not one of 2, 3")
    fields = {}
    for _ in range(num_fields):
        name = cursor.string()
        fields[name] = cursor.value(cursor.scalar("I"))
    places = []
    for _ in range(num_tensors):
        name, dimensions = cursor.string(), cursor.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise GgufMalformed(f"tensor {name} has {dimensions} dimensions, the limit is {_MAX_DIMENSIONS}")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        places.append(GgufTensor(name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = fields.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    return Gguf(fields, tuple(GgufTensor(t.name, t.shape, t.kind, start + t.offset) for t in places))
