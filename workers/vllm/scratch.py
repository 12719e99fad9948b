"""A folder for a worker and its engine process. What killed workers left behind goes when the next one starts."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "headrace-vllm-"
_LOCK = "in-use"
"""A file that the folder's owner holds a lock on; the kernel lets go of it however the owner ends."""


class Scratch:
    """A folder of its own, until `remove`."""

    def __init__(self, parent: Path | None = None) -> None:
        """parent: where such folders are. Default: the system's place for temporary files."""
        parent = parent or Path(tempfile.gettempdir())
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        fresh = self.path / "new"
        self._lock = os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh.rename(self.path / _LOCK)  # only now may others ask whether it is held

    def remove(self) -> None:
        """With all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(parent: Path) -> None:
    for file in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            lock = os.open(file, os.O_WRONLY)
        except OSError:  # somebody else's, or gone by now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
