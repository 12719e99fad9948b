"""A parent of processes that do the same: it forks them, starts again whichever dies, passes signals on, and ends last.

| a process … | while all serve                                               | after SIGTERM or SIGINT        |
|-------------|---------------------------------------------------------------|--------------------------------|
| starting    | ends: nothing can be served, all end with its status           | is waited for                  |
| begun       | ends: started again, at once the first time, then after pauses | is waited for                  |

Forked and not run anew: what was imported is there at once, and shared in memory. So the parent runs no event loop and
starts no thread. A process whose parent is gone gets SIGTERM from the kernel.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Final, NoReturn

import structlog

from planes.wire.errors import HeadraceError
from process.settings import refused
from process.signals import end_on_sigterm

_log = structlog.get_logger()

_PAUSES_S: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S: Final = 60.0
"""A process that lived this long is started again at once."""
_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_PASSED_ON: Final = _ENDING | {signal.SIGHUP}
_PR_SET_PDEATHSIG: Final = 1

Begun = Callable[[], None]
"""Called by a process that does its work: from then on it is worth starting again."""


class Restarts:
    """After which pause a process that has ended is started again: longer after each life that was short."""

    def __init__(self) -> None:
        self._num_quick = 0

    def pause_s(self, lived_s: float) -> float:
        self._num_quick = 0 if lived_s > _STEADY_S else self._num_quick
        pause_s = _PAUSES_S[min(self._num_quick, len(_PAUSES_S) - 1)]
        self._num_quick += 1
        return pause_s


@dataclass(slots=True, eq=False)
class _Child:
    number: int
    """From 1."""
    restarts: Restarts
    sockets: list[socket.socket]
    """The parent's own copies: connections that wait in them outlive the process. Empty: closed for a long pause."""
    pid: int = 0
    """0: it does not run."""
    began: int = -1
    """Read end of the pipe that tells that it has begun."""
    has_begun: bool = False
    """It, or one before it."""
    started_at: float = 0.0
    due_at: float = 0.0
    """When to start it, while it does not run."""


class Parent:
    """open_sockets: those of one process, for which all listen side by side.

    run: what a process does, number (from 1), sockets and `Begun` given; its return ends it with status 0.
    """

    def __init__(
        self,
        num_processes: int,
        open_sockets: Callable[[], list[socket.socket]],
        run: Callable[[int, list[socket.socket], Begun], None],
    ) -> None:
        self._open_sockets = open_sockets
        self._run = run
        self._children: list[_Child] = []
        self._is_ending = False
        self._status = 0
        for number in range(1, num_processes + 1):
            self._children.append(_Child(number, Restarts(), open_sockets()))

    def run(self) -> int:
        """Until all have ended, as a signal asked for, or as one could not begin.

        Returns:  0, or the status of the first that ended with another one.
        """
        with _signals() as told:
            while True:
                now = time.monotonic()
                for child in self._children:
                    if not (child.pid or self._is_ending) and now >= child.due_at:
                        self._start(child)
                if not any(child.pid for child in self._children) and self._is_ending:
                    return self._status
                for number in _told(told, self._wait_s(time.monotonic())):
                    self._pass_on(number)
                self._reap()

    def _wait_s(self, now: float) -> float | None:
        due = [child.due_at - now for child in self._children if not child.pid]
        return max(0.0, min(due)) if due and not self._is_ending else None

    def _start(self, child: _Child) -> None:
        if not child.sockets:
            try:
                child.sockets = self._open_sockets()
            except HeadraceError as exc:
                pause_s = child.restarts.pause_s(0.0) or _PAUSES_S[1]
                _log.warning("process.not_started", process=child.number, reason=str(exc), again_in_s=pause_s)
                child.due_at = time.monotonic() + pause_s
                return
        parent = os.getpid()
        child.began, begin = os.pipe()
        os.set_blocking(child.began, False)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # else the child would take one for the parent
        child.pid = os.fork()
        if not child.pid:
            self._become(child, begin, parent)
        os.close(begin)
        child.started_at = time.monotonic()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _become(self, child: _Child, begin: int, parent: int) -> NoReturn:
        """In the new process."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setpgid(0, 0)  # Ctrl-C is for the parent, which passes it on
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            end_on_sigterm()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
            for other in self._children:
                if other is not child:
                    _close(other)
            if os.getppid() == parent:  # else the kernel has nobody whose end it could tell
                self._run(child.number, child.sockets, lambda: _tell(begin))
                status = 0
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else 1
        except HeadraceError as exc:
            status = refused(str(exc))
        except BaseException:  # noqa: BLE001 - this process ends here, and nobody else would tell why
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _pass_on(self, number: int) -> None:
        if number not in _PASSED_ON:
            return
        if number in _ENDING:
            self._end()
        for child in self._children:
            if child.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM if number in _ENDING else number)

    def _end(self) -> None:
        """Nothing is started any more, and a listener that its process closes is closed."""
        self._is_ending = True
        for child in self._children:
            _close(child)

    def _reap(self) -> None:
        for child in self._children:
            if not child.pid:
                continue
            pid, result = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                with contextlib.suppress(BlockingIOError):
                    child.has_begun |= os.read(child.began, 1) != b""
                os.close(child.began)
                child.pid, child.began = 0, -1
                self._ended(child, os.waitstatus_to_exitcode(result))

    def _ended(self, child: _Child, status: int) -> None:
        if self._is_ending or not child.has_begun:
            self._status = self._status or (128 - status if status < 0 else status)
        if self._is_ending:
            return
        if not child.has_begun:
            _log.error("process.unusable", process=child.number, status=status)
            self._status = self._status or 1
            self._pass_on(signal.SIGTERM)
            return
        now = time.monotonic()
        pause_s = child.restarts.pause_s(now - child.started_at)
        child.due_at = now + pause_s
        if pause_s:  # who connects in so long a time is better off with another process
            _close(child)
        _log.warning("process.ended", process=child.number, status=status, again_in_s=pause_s)


def _close(child: _Child) -> None:
    for each in child.sockets:
        each.close()
    child.sockets = []


def _tell(begin: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(begin, b"1")


def _caught(number: int, frame: FrameType | None) -> None:
    """The wake-up socket tells."""


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that gets the number of each signal, a byte each, whichever thread it came to."""
    told, tells = socket.socketpair()
    with told, tells:
        tells.setblocking(False)
        numbers = (*_PASSED_ON, signal.SIGCHLD)
        before = {number: signal.getsignal(number) for number in numbers}
        fd = signal.set_wakeup_fd(tells.fileno())
        for number in numbers:
            signal.signal(number, _caught)
        try:
            yield told
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)


def _told(told: socket.socket, wait_s: float | None) -> bytes:
    ready, _, _ = select.select([told], [], [], wait_s)
    return told.recv(256) if ready else b""
