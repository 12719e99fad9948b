"""Files of certificates, keys and secrets: what is made of them is made anew when they change."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

_log = structlog.get_logger()
_Made = TypeVar("_Made")

_MAX_SECRET_BYTES = 16_384
"""A credentials file of NATS has 1 to 2 KB."""


class UnusableFile(ValueError):  # noqa: N818 - names what is wrong
    """A file is missing, unreadable, or not what it should be. The message names it, and shows nothing of it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


class Reloaded(Generic[_Made]):
    """What `make` makes of some files. Each call looks at their times, and makes it anew if one has changed.

    Whoever connects or is connected to calls, so what runs is left alone. If the new files cannot be used, which is
    so while one of a pair has been replaced and the other has not, that is logged once and the last good ones count.

    Raises:  UnusableFile, at the start only.
    """

    def __init__(self, files: Iterable[Path | None], make: Callable[[], _Made]) -> None:
        self._files = [file for file in files if file is not None]
        self._make = make
        self._stamp = self._read_stamp()
        self._made = make()

    def __call__(self) -> _Made:
        stamp = self._read_stamp()
        if stamp != self._stamp:
            self._stamp = stamp  # of before: what is written meanwhile is a change once more
            names = ", ".join(map(str, self._files))
            try:
                self._made = self._make()
            except UnusableFile as exc:
                _log.warning("secret_files.unusable", reason=str(exc), kept="what they said before")
            else:
                _log.info("secret_files.reloaded", files=names)
        return self._made

    def _read_stamp(self) -> list[tuple[int, int, int]]:
        return [_stamp(file) for file in self._files]


def read_secret(path: Path) -> str:
    """The text of a small file without the line end after it.  Raises:  UnusableFile."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_SECRET_BYTES + 1)
        text = content.decode().rstrip("\r\n")
    except OSError as exc:
        raise UnusableFile(path, f"cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise UnusableFile(path, "is no text") from None
    if len(content) > _MAX_SECRET_BYTES:
        raise UnusableFile(path, f"has more than {_MAX_SECRET_BYTES} bytes; a secret is shorter")
    if not text.strip():
        raise UnusableFile(path, "is empty")
    return text


def read_bytes(path: Path) -> bytes:
    """Raises:  UnusableFile."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UnusableFile(path, f"cannot be read: {exc.strerror}") from exc


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when the file does, also one that is reached by a link as in a mounted Kubernetes secret."""
    try:
        found = os.stat(path)  # noqa: PTH116 - of a link's target; the fastest, as each connection pays it
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_ino, found.st_size)
