"""`python -P -m workers.adopted`, which `headrace adopt` becomes."""

import sys

from process.signals import end_on_sigterm


def main() -> int:
    """Adopt the server that `sys.argv` names."""
    end_on_sigterm()
    from process.settings import run  # noqa: PLC0415 - takes half a second
    from workers.adopted.command import app  # noqa: PLC0415

    return run(app)


if __name__ == "__main__":
    sys.exit(main())
