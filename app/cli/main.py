"""Where the command `headrace` begins: SIGTERM counts before the imports, which take half a second."""

import gc
import sys

from process.signals import end_on_sigterm


def main() -> None:
    """Entry point of the distribution."""
    end_on_sigterm()
    gc.disable()  # imports leave nothing to collect, and what is there would be walked again and again
    from app.cli.commands import app  # noqa: PLC0415 - takes half a second
    from process.settings import run  # noqa: PLC0415

    gc.enable()
    sys.exit(run(app))
