"""The first thing that every process of ours does. It imports nothing that takes time."""

import signal
import sys


def end_on_sigterm() -> None:
    """From here on SIGTERM ends the process in order, until it arranges something else.

    Left to the kernel, it would leave half-written files behind, and not end process 1 of a container at all. One that
    came while `hold_sigterm` was in force counts now.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def hold_sigterm() -> None:
    """Keep a SIGTERM for the program that this process is about to become, which calls `end_on_sigterm` first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
