"""What the processes of one gateway ask each other, over Unix sockets in a folder that is theirs alone.

One question a connection: a line of JSON there, the answer back, and the end. A sibling that is not there, or not in
time, is left out.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import structlog

from app.processes.adding import Kept
from planes.wire.unreadable import UNREADABLE

_log = structlog.get_logger()

_PATIENCE_S: Final = 5.0
_MOST_QUESTION_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a gateway's processes this is, from 1, and where they meet.

    secret: the processes' own, drawn at their start and kept nowhere: what they record shares its ids (`--record`).
    """

    number: int
    num_processes: int
    folder: Path
    secret: bytes = field(repr=False)

    def socket(self, number: int) -> Path:
        return self.folder / f"{number}.sock"

    def counters(self, number: int) -> Path:
        return self.folder / f"{number}.counters"


class AskMetrics(msgspec.Struct, frozen=True, tag=True):
    """`list[Family]` in MessagePack."""


class AskHealth(msgspec.Struct, frozen=True, tag=True):
    """`Health` in JSON."""


class AskRoute(msgspec.Struct, frozen=True, tag=True):
    """Why a request went where it went, in JSON, or null. tenant: who may see it; None: an admin."""

    request: str
    tenant: str | None


class AskRoutes(msgspec.Struct, frozen=True, tag=True):
    """Timelines, the latest first, as a JSON array. tenant: whose; None: all."""

    tenant: str | None
    limit: int


Ask = AskMetrics | AskHealth | AskRoute | AskRoutes
_ASKED: Final = msgspec.json.Decoder(Ask)


class Siblings:
    """One process's view of those beside it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.counters = Kept(place.counters(place.number), place.number)
        self._others = [number for number in range(1, place.num_processes + 1) if number != place.number]

    async def run(self, answer: Callable[[Ask], bytes]) -> None:
        """Answer the others until cancelled."""

        async def asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    writer.write(answer(_ASKED.decode(await reader.readline())))
                    await writer.drain()
            except (OSError, ValueError, TimeoutError, *UNREADABLE) as exc:
                _log.warning("sibling.not_answered", reason=str(exc) or "it took too long")
            finally:
                writer.close()

        path = self.place.socket(self.place.number)
        path.unlink(missing_ok=True)  # of the process that was here before
        server = await asyncio.start_unix_server(asked, path, limit=_MOST_QUESTION_BYTES)
        async with server:
            await server.serve_forever()

    async def ask(self, ask: Ask) -> dict[int, bytes | None]:
        """The others' answers by their numbers; None: there is none."""
        question = msgspec.json.encode(ask) + b"\n"
        answers = await asyncio.gather(*(self._asked(number, question) for number in self._others))
        return dict(zip(self._others, answers, strict=True))

    async def _asked(self, number: int, question: bytes) -> bytes | None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                reader, writer = await asyncio.open_unix_connection(self.place.socket(number))
                try:
                    writer.write(question)
                    return await reader.read() or None
                finally:
                    writer.close()
        return None
