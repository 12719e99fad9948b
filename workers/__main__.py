"""`python -P -m workers`, which `headrace worker` becomes. vLLM's engine process imports this module again."""

import os
import sys

from process.signals import end_on_sigterm


def main() -> int:
    """Run the worker that `sys.argv` describes."""
    end_on_sigterm()
    os.environ["PYTHONSAFEPATH"] = "1"  # the interpreters that vLLM starts shall not look in the current directory
    from process.settings import run  # noqa: PLC0415 - takes half a second
    from workers.command import app  # noqa: PLC0415

    return run(app)


if __name__ == "__main__":
    sys.exit(main())
