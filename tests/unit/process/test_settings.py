import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import os, signal, sys, time
from process.settings import command_line, run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from birth
app = command_line("mill", "")

@app.default
def main():
    try:
        os.kill(os.getpid(), int(sys.argv.pop()))
        time.sleep(60)
    finally:
        print("tidied up")

sys.exit(run(app))
"""


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_a_command_that_is_interrupted_tidies_up_and_says_nothing(number, status):
    argv = [sys.executable, "-c", COMMAND.replace("sys.argv.pop()", str(number))]
    done = subprocess.run(argv, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "tidied up\n", "")
