"""How we start our own programs: with what is installed, never with a folder of that name in the current directory."""

import sys


def program(module: str, *arguments: str) -> list[str]:
    """Command line of `module` in a new interpreter; `python -m` alone would look in the current directory first."""
    return [sys.executable, "-P", "-m", module, *arguments]
