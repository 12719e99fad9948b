"""Which cores an engine process runs on."""

import contextlib
import os
from collections.abc import Callable, Collection
from pathlib import Path


def pin_threads(
    pid: int,
    cores: Collection[int],
    *,
    proc: Path = Path("/proc"),
    pin: Callable[[int, Collection[int]], None] = os.sched_setaffinity,
) -> None:
    """Move every thread of a process to these cores; those made later follow. Threads come and go meanwhile."""
    for thread in (proc / str(pid) / "task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            pin(int(thread.name), cores)
