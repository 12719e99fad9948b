"""The rules of a stream without its socket: limits, frames, heartbeat."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, TypeVar, get_args

import msgspec

from planes.wire.frames import FromGateway, FromWorker, StreamId

T = TypeVar("T")

TOO_DEEP: Final = "a frame has a field that nobody knows and that is nested too deeply"

_encode = msgspec.msgpack.Encoder().encode

FROM_GATEWAY, FROM_WORKER = (
    frozenset(kind.__struct_config__.tag for kind in get_args(kinds)) for kinds in (FromGateway, FromWorker)
)
"""Tags of the frames that this version knows."""


class ProtocolError(Exception):
    """The peer sent something that is no frame of ours; the connection ends."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds and heartbeat of one connection.

    ping_s: seconds of silence before a Ping.  dead_s: seconds of silence after which the peer counts as dead.
    max_frame_bytes: longest frame accepted or sent.  max_unsent_bytes: most bytes waiting for a peer that reads slowly.
    greeting_s: longest time until the peer has said who it is.  max_strangers: most peers that have not yet.
    """

    ping_s: float = 1.0
    dead_s: float = 3.0
    max_frame_bytes: int = 64 << 20
    max_unsent_bytes: int = 128 << 20
    greeting_s: float = 5.0
    max_strangers: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.ping_s < self.dead_s:
            raise ValueError(f"ping_s is {self.ping_s} and dead_s {self.dead_s}; 0 < ping_s < dead_s must hold")


class FrameBuffer:
    """Cuts a byte stream into frames."""

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._rest = bytearray()
        self._needed = 4

    def feed(self, data: bytes) -> list[memoryview]:
        """Frames completed by `data`, in order, without their length.  Raises: ProtocolError for a frame too long."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
        view, at, end = memoryview(data), 0, len(data)
        frames = []
        self._needed = 4
        while end - at >= 4:
            size = int.from_bytes(view[at : at + 4], "little")
            if size > self.max_frame_bytes:
                raise ProtocolError(f"the peer announces a frame of {size} bytes; the limit is {self.max_frame_bytes}")
            if end - at - 4 < size:
                self._needed = 4 + size
                break
            frames.append(view[at + 4 : at + 4 + size])
            at += 4 + size
        self._rest = bytearray(view[at:])
        return frames


def framed(message: FromGateway | FromWorker, max_frame_bytes: int) -> bytes:
    """The message as a frame.  Raises:  ProtocolError if it is longer than a frame may be."""
    payload = _encode(message)
    if len(payload) > max_frame_bytes:
        raise ProtocolError(f"{type(message).__name__} takes {len(payload)} bytes; the limit is {max_frame_bytes}")
    return len(payload).to_bytes(4, "little") + payload


class _Tagged(msgspec.Struct):
    """What every frame has, of whatever version."""

    type: str


class _Addressed(msgspec.Struct):
    """What every Generate has, of whatever version."""

    stream: StreamId


def tag_of(frame: memoryview) -> str:
    """Which kind of frame it says it is.  Raises:  msgspec.MsgspecError if it is none of any version; ProtocolError."""
    return _read(frame, _Tagged).type


def stream_of(frame: memoryview) -> StreamId:
    """The stream of a Generate that cannot be read as a whole.  Raises:  msgspec.MsgspecError, ProtocolError."""
    return _read(frame, _Addressed).stream


def _read(frame: memoryview, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(frame, type=kind)
    except RecursionError as exc:
        raise ProtocolError(TOO_DEEP) from exc


class Beat(Enum):
    """What a beat of the heart asks for."""

    NOTHING = auto()
    PING = auto()
    GIVE_UP = auto()


class Heartbeat:
    """Whether the peer lives. The owner sets `was_heard` at every read and calls `beat` every `ping_s` seconds.

    Beats are counted, not seconds: after a stall of our own loop, what the peer sent meanwhile counts first.
    """

    __slots__ = ("_max_missed", "_num_missed", "was_heard")

    def __init__(self, limits: StreamLimits) -> None:
        self._max_missed = limits.dead_s / limits.ping_s
        self._num_missed = 0
        self.was_heard = True

    def beat(self) -> Beat:
        if self.was_heard:
            self.was_heard = False
            self._num_missed = 0
            return Beat.NOTHING
        self._num_missed += 1
        return Beat.GIVE_UP if self._num_missed >= self._max_missed else Beat.PING
