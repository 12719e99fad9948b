"""What a long comparison shows while it runs, and how it shares its runs among processes."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from process.logging import configure

T = TypeVar("T")
R = TypeVar("R")


class Progress:
    """One line on standard error that is written over: what runs, how far it is, how long it will take."""

    def __init__(self, num_runs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_runs, self._clock = num_runs, clock
        self._runs_done, self._started, self._shown = 0, clock(), clock()
        self._pause_s = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs fewer lines than a terminal

    def start(self, label: str) -> Callable[[int, int], None]:
        def on_progress(ended: int, total: int) -> None:
            now = self._clock()
            if now - self._shown < self._pause_s:
                return
            self._shown = now
            done = (self._runs_done + ended / total) / self._num_runs
            left_s = (now - self._started) * (1 - done) / done if done else 0.0
            bar = "#" * int(24 * done)
            self._write(f"[{bar:<24}] {done:4.0%}  about {_duration(left_s)} left  {label}: {ended}/{total}")

        return on_progress

    def end(self) -> None:
        self._runs_done += 1
        if self._runs_done == self._num_runs:
            self._write(f"{self._num_runs} runs in {_duration(self._clock() - self._started)}\n")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[2K{text}" if sys.stderr.isatty() else f"{text.strip()}\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def each(work: Callable[[T], R], items: Sequence[T], jobs: int) -> Iterator[R]:
    """`work` of every item, in their order, from `jobs` processes where that is more than one."""
    if jobs == 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(jobs, initializer=configure, initargs=("error",)) as pool:
        yield from pool.map(work, items)
