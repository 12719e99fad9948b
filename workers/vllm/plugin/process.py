"""The engine process: it ends with its worker, at once when it has released everything, and its failure is noted."""

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing import util

from workers.vllm.failure import note_failures

_PR_SET_PDEATHSIG = 1


class BeforeLoading:
    """Empty: vLLM asks for a worker extension before it loads the model, and so for the whole plug-in."""


def install() -> None:
    """In vLLM's engine process (`vllm.v1.engine.core.EngineCoreProc.run_engine_core`); elsewhere nothing happens."""
    if multiprocessing.current_process().name.startswith("EngineCore"):
        die_with_parent()
        note_failures()


def die_with_parent() -> None:
    """Have the kernel kill this process when the worker ends, however it ends; Ctrl-C is the worker's to handle."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it ended before we asked
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def trim_memory() -> None:
    """Once the model is loaded: 5 % of the process are buffers that nobody needs any more."""
    ctypes.CDLL(None).malloc_trim(0)


def leave_at_once() -> None:
    """Nothing, unless the process was asked to end; then NIXL, the model's workers and the publisher are closed.

    vLLM and Python would now free their memory object by object, for seconds; the kernel does it at once. So ends a
    forked child, too.
    """
    if isinstance(sys.exc_info()[1], SystemExit):
        util._exit_function()  # type: ignore[attr-defined]  # noqa: SLF001
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
