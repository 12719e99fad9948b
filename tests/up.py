"""`headrace up` as a process of its own, for tests of either kind."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port():
    """Below the ports that the system gives to whoever asks for any."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


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
