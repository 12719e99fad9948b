"""Reading a process's settings: one frozen dataclass gives flags, `HEADRACE_*` variables, defaults and help (ADR 7)."""

import signal
import sys
from collections.abc import Callable
from typing import Any

import cyclopts
from cyclopts.config import Env

from planes.wire.errors import HeadraceError, UnusableSetting


def check_setting(name: str, value: Any, check: Callable[[Any], object]) -> None:
    """Raises:  UnusableSetting where `check` raises ValueError."""
    try:
        check(value)
    except ValueError as exc:
        raise UnusableSetting(name, value, str(exc)) from exc


def command_line(name: str, summary: str) -> cyclopts.App:
    """A command line whose flags may also come from `HEADRACE_<FLAG>`, whatever the command."""
    return cyclopts.App(name=name, help=summary, config=Env("HEADRACE_", command=False), version_flags=[])


def run(app: cyclopts.App) -> int:
    """Run the command that `sys.argv` names. Returns the exit status: 2, after one line, if it could not start.

    SIGTERM ends it in order where the command arranges nothing else: left to the kernel, it would leave half-written
    files behind, and not end process 1 of a container at all.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        status = app(exit_on_error=False, print_error=False)
    except (cyclopts.CycloptsError, HeadraceError) as exc:
        print(f"headrace: {' '.join(str(exc).split())}", file=sys.stderr)  # noqa: T201 - the command line's own answer
        return 2
    return status if isinstance(status, int) else 0
