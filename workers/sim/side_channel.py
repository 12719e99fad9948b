"""The talk around a handover that NIXL does not carry: one short TCP exchange, msgpack with a length before it.

A decode worker connects to the prefill worker's handover endpoint, says one thing, and keeps the connection open until
its KV cache is there; either side's end is noticed at once, because the connection ends with it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from planes.wire.errors import Interrupted
from planes.wire.unreadable import UNREADABLE

MAX_MESSAGE = 16 << 20
"""Bytes; an announcement takes 4 per block."""


class HandoverFailed(Interrupted):
    """The KV cache did not arrive; the request can be computed elsewhere."""

    code = "handover_failed"


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """How NIXL reaches an engine's block pool."""

    metadata: bytes
    base: int
    """Address of the pool over there."""
    num_blocks: int


class Announcement(msgspec.Struct, frozen=True, tag="announce", array_like=True):
    """Push, decode → prefill: write the last `len(blocks) / 4` of the request's `total` blocks here."""

    engine_id: str
    """Whom this is meant for; an engine that has restarted since refuses."""
    request: str
    total: int
    blocks: bytes
    """Packed little-endian uint32: where they go, in prompt order."""
    bytes_per_block: int
    sender: str
    peer: Peer | None = None
    """None: send the words themselves (`Written.words`), there is no NIXL."""


class Taken(msgspec.Struct, frozen=True, tag="taken", array_like=True):
    """Pull without NIXL, decode → prefill: the lease may end."""

    engine_id: str
    request: str


class Written(msgspec.Struct, frozen=True, tag="written", array_like=True):
    """Prefill → decode: done. `words`: without NIXL, what the announced blocks hold (packed uint64)."""

    words: bytes = b""


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """Prefill → decode: there will be no KV cache."""

    reason: str


Question = Announcement | Taken
Answer = Written | Refused

_question: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answer: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class Caller(Protocol):
    """Somebody who waits for an answer."""

    def answer(self, answer: Answer) -> None:
        """Say it; the first answer counts."""


class Listener:
    """The prefill side. `on_question` gets each question with its caller; `on_gone` each caller that went away."""

    def __init__(
        self, on_question: Callable[[Question, Caller], None], on_gone: Callable[[Question, Caller], None]
    ) -> None:
        self._on_question = on_question
        self._on_gone = on_gone
        self._server: asyncio.Server | None = None
        self._callers: dict[_Caller, asyncio.Task[None] | None] = {}

    async def start(self, host: str, port: int) -> int:
        """Returns the port. Raises:  OSError if it cannot listen there."""
        self._server = await asyncio.start_server(self._serve, host, port)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Hang up on everybody."""
        if self._server is None:
            return
        self._server.close()
        tasks = [task for task in self._callers.values() if task is not None]
        for caller in self._callers:
            caller.writer.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = _Caller(writer)
        self._callers[caller] = asyncio.current_task()
        try:
            question = _question.decode(await _read(reader))
            self._on_question(question, caller)
            with contextlib.suppress(OSError):
                await reader.read(1)  # until the other side hangs up
            self._on_gone(question, caller)
        except (OSError, asyncio.IncompleteReadError, ValueError, *UNREADABLE) as exc:
            caller.answer(Refused(f"not understood: {exc}"))
        finally:
            del self._callers[caller]
            writer.close()


class _Caller:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._has_answered = False

    def answer(self, answer: Answer) -> None:
        if not self._has_answered and not self.writer.is_closing():
            self._has_answered = True
            self.writer.write(_frame(answer))


@contextlib.asynccontextmanager
async def asking(host: str, port: int, question: Question) -> AsyncIterator[asyncio.StreamReader]:
    """Connect and ask; the connection ends with the block. Read the answer with `answer_from`.

    Raises:  HandoverFailed if nobody is there.
    """
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as exc:
        raise HandoverFailed(f"the prefill worker at {host}:{port} cannot be reached: {exc}") from exc
    try:
        writer.write(_frame(question))
        yield reader
    finally:
        writer.close()


async def answer_from(reader: asyncio.StreamReader) -> Written:
    """Raises:  HandoverFailed if the answer is a refusal, or the other side hung up without one."""
    try:
        answer = _answer.decode(await _read(reader))
    except (OSError, asyncio.IncompleteReadError, ValueError, *UNREADABLE) as exc:
        raise HandoverFailed(f"the prefill worker hung up before the KV cache was handed over ({exc})") from exc
    if isinstance(answer, Refused):
        raise HandoverFailed(f"the prefill worker refused: {answer.reason}")
    return answer


def _frame(message: Question | Answer) -> bytes:
    encoded = msgspec.msgpack.encode(message)
    return len(encoded).to_bytes(4, "little") + encoded


async def _read(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(4), "little")
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE}")
    return await reader.readexactly(length)
