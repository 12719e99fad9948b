"""What the gateway served, written down to be simulated: `--record FOLDER` (ADR 31).

A line a request in Mooncake's trace format: when it arrived, how many tokens its prompt and its answer had, and one id
for each 512 tokens of its prompt, the last of them partial. No text and no token: an id is the first 32 bits of a keyed
hash of everything up to its block's end, under a key that is drawn at the gateway's start and kept nowhere. Equal
ids mean equal prefixes, and nothing else can be read from them; two gateways, or two starts of one, share none. The
processes of one gateway (`--processes`) share a key, and have a folder each in `FOLDER`.

Blocks of 512 tokens are the format's, whatever the workers' block size: sharing is told up to 511 tokens short.

    a request ends ── ended() ──► waiting ── every second, on a thread ──► hashed, written, rotated
"""

import asyncio
import contextlib
import hashlib
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import structlog

from app.metrics import Gauge, Total
from planes.wire.blocks import Tokens
from planes.wire.errors import UnusableSetting

_log = structlog.get_logger()

TRACE_BLOCK_SIZE: Final = 512
"""Tokens behind one entry of a trace's `hash_ids`."""
_PERIOD_S: Final = 1.0
_MOST_WAITING_TOKENS: Final = 16 << 20
"""Prompts that wait to be written keep their tokens in memory, four bytes each."""


class TraceLine(msgspec.Struct, frozen=True):
    """timestamp: milliseconds since 1970.  hash_ids: one per 512 prompt tokens, each below 2**32."""

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What a line is made of. arrived_at: seconds since 1970.  root: prompts of different ones share no block."""

    arrived_at: float
    prompt: Tokens
    root: str
    completion_tokens: int


def hash_ids(prompt: Tokens, root: str, key: bytes) -> list[int]:
    """One id per 512 tokens, the last for what is left of them; each names everything before its block's end."""
    name = hashlib.blake2b(root.encode(), key=key, digest_size=16).digest()
    data, size, ids = prompt.astype("<u4", copy=False).tobytes(), 4 * TRACE_BLOCK_SIZE, []
    for start in range(0, len(data), size):
        name = hashlib.blake2b(name + data[start : start + size], key=key, digest_size=16).digest()
        ids.append(int.from_bytes(name[:4], "little"))
    return ids


class Recorder:
    """Writes `FOLDER/requests-<start>-<number>.jsonl`; of all such files in the folder only the newest stay.

    Call `ended` from the event loop; `run` writes. What cannot be written, or comes faster than it is, is left out,
    logged and counted: a full disk fails no request.
    """

    def __init__(
        self,
        folder: Path,
        *,
        file_bytes: int,
        num_files: int,
        wall_clock: Callable[[], float],
        key: bytes | None = None,
    ) -> None:
        """`key`: of the ids, up to 64 bytes; drawn if not given.  Raises:  UnusableSetting."""
        self._folder, self._file_bytes, self._num_files = folder, file_bytes, num_files
        self._wall_clock = wall_clock
        self._key = secrets.token_bytes(32) if key is None else key
        self._waiting: list[EndedRequest] = []
        self._waiting_tokens = 0
        self._num_written = self._num_left_out = 0
        self._stem = f"requests-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(wall_clock()))}-{secrets.token_hex(2)}"
        self._number = 0
        self._path = self._next_path()
        self._writing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            self._remove_oldest(num_files)
        except OSError as exc:
            raise UnusableSetting("record", str(folder), f"it cannot be written to: {exc}") from exc

    def ended(self, prompt: Tokens, root: str, *, completion_tokens: int, ago_s: float) -> None:
        """A request has ended that arrived `ago_s` ago. completion_tokens: 1 or more."""
        if self._waiting_tokens + len(prompt) > _MOST_WAITING_TOKENS:
            self._num_left_out += 1
            return
        self._waiting_tokens += len(prompt)
        self._waiting.append(EndedRequest(self._wall_clock() - ago_s, prompt, root, completion_tokens))

    async def run(self) -> None:
        """Write every second, and what is left when cancelled."""
        try:
            while True:
                await asyncio.sleep(_PERIOD_S)
                if waiting := self._take():
                    await asyncio.to_thread(self.write, waiting)
        finally:
            self.write(self._take())

    def gauges(self) -> Iterator[Gauge]:
        """For the metrics."""
        yield Total("recorded", "Requests written by --record.", self._num_written)
        yield Total("record_left_out", "Requests that --record could not write.", self._num_left_out)

    def _take(self) -> list[EndedRequest]:
        waiting, self._waiting, self._waiting_tokens = self._waiting, [], 0
        return waiting

    def write(self, requests: Iterable[EndedRequest]) -> None:
        """Append their lines, each to the file that has room for it."""
        lines = [msgspec.json.encode(self._line(request)) + b"\n" for request in requests]
        done = 0
        with self._writing:  # the last call comes from another thread, and maybe before the one before has ended
            try:
                while done < len(lines):
                    done += self._append(lines[done:])
            except OSError as exc:
                self._num_left_out += len(lines) - done
                _log.warning("record.failed", folder=str(self._folder), left_out=len(lines) - done, reason=str(exc))
            self._num_written += done

    def _append(self, lines: list[bytes]) -> int:
        """Returns:  how many of them, at least one."""
        room, count = self._file_bytes - _size(self._path), 0
        if room < len(lines[0]) and room < self._file_bytes:
            self._path, room = self._next_path(), self._file_bytes
            self._remove_oldest(self._num_files - 1)
        while count < len(lines) and (not count or room >= len(lines[count])):
            room -= len(lines[count])
            count += 1
        size = _size(self._path)
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(lines[:count]))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)  # a part of a line would make all the others unreadable
            raise
        return count

    def _remove_oldest(self, num_left: int) -> None:
        found = sorted(self._folder.glob("requests-*.jsonl"))
        for path in found[: max(0, len(found) - num_left)]:
            path.unlink(missing_ok=True)

    def _next_path(self) -> Path:
        self._number += 1
        return self._folder / f"{self._stem}-{self._number:05}.jsonl"

    def _line(self, request: EndedRequest) -> TraceLine:
        return TraceLine(
            timestamp=max(0, math.floor(request.arrived_at * 1000)),
            input_length=len(request.prompt),
            output_length=request.completion_tokens,
            hash_ids=hash_ids(request.prompt, request.root, self._key),
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
