"""`headrace up` as a process of its own, for tests of either kind."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_up(port, output, *flags, env, argv=(sys.executable, "-m", "app.cli"), cwd=ROOT):
    """Begin it in a session of its own, like one in a terminal; it writes to the file `output`."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [*argv, "up", "--port", str(port), *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=os.environ | env,
            start_new_session=True,
        )
