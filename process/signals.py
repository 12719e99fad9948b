"""The first thing that every process of ours does. It imports nothing that takes time."""

import _thread
import os
import signal
import sys
import time
from typing import Any

_AGAIN_AFTER_S = 0.01


def end_on_sigterm() -> None:
    """From here on SIGTERM ends the process in order, until it arranges something else.

    Left to the kernel, it would leave half-written files behind, and not end process 1 of a container at all. One that
    came while `hold_sigterm` was in force counts now.

    A handler runs wherever the interpreter is, also where exceptions lead nowhere: in the callback with which every
    import ends, in a finalizer. Such a SIGTERM is sent again.
    """
    signal.signal(signal.SIGTERM, _end)
    sys.unraisablehook = _unraisable
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def hold_sigterm() -> None:
    """Keep a SIGTERM for the program that this process is about to become, which calls `end_on_sigterm` first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _end(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _unraisable(lost: Any) -> None:
    if isinstance(lost.exc_value, SystemExit):
        _thread.start_new_thread(_send_again, ())
    else:
        sys.__unraisablehook__(lost)


def _send_again() -> None:
    time.sleep(_AGAIN_AFTER_S)  # sent at once, it would find the interpreter where it was
    os.kill(os.getpid(), signal.SIGTERM)
