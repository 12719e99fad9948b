"""Why vLLM's engine process could not start. vLLM tells its parent only that it failed; the reason is in the log.

The engine process leaves that reason in a file, the worker reads it when it has to say why.
"""

import logging
import os
from pathlib import Path

_VARIABLE = "HEADRACE_VLLM_FAILURE"
_MAX_LENGTH = 500


class _LastError(logging.Handler):
    """Keeps the last logged exception in a file."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        if isinstance(error, BaseException):
            self._file.write_text(f"{type(error).__name__}: {error}")


def expect_failure(folder: Path) -> None:
    """In the worker, before the engine process starts."""
    os.environ[_VARIABLE] = str(folder / "failure")


def note_failures() -> None:
    """In the engine process: from now on vLLM's errors are kept for the worker."""
    if file := os.environ.get(_VARIABLE):
        logging.getLogger("vllm").addHandler(_LastError(Path(file)))


def cause_of(exc: Exception) -> str:
    """In the worker: what ended the start, in one line."""
    if "Engine core initialization failed" not in str(exc):
        return f"{type(exc).__name__}: {exc}"
    file = Path(os.environ.get(_VARIABLE, ""))
    if not file.is_file():
        return "its engine process failed, and its last lines above say why"
    return f"its engine process failed with {' '.join(file.read_text().split())[:_MAX_LENGTH]}"
