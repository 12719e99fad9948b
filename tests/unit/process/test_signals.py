"""SIGTERM that comes while a process of ours is only beginning, as real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

SLOW = """
import sys
print("importing", flush=True)
sys.stdin.readline()
"""
"""A module whose import lasts until somebody writes a line."""
SLOW_START = f"""
import sys
if "workers" in sys.orig_argv:{SLOW.replace(chr(10), chr(10) + "    ")}
"""
"""Run before the first line of a program, but only where `headrace worker` has become `python -m workers`."""


def begin(folder, module, *argv):
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *argv],
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def terminated(process):
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate("\n", timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("app.cli", ["gateway"]),
        ("app.cli", ["up", "--engine", "sim"]),
        ("app.cli", ["worker", "--engine", "sim"]),
        ("app.cli", ["etcd"]),
        ("workers", ["--engine", "sim"]),
    ],
)
def test_sigterm_counts_while_a_process_is_still_importing(tmp_path, module, argv):
    (tmp_path / "cyclopts.py").write_text(SLOW)
    assert terminated(begin(tmp_path, module, *argv)) == (128 + signal.SIGTERM, "")


def test_sigterm_counts_while_a_worker_s_interpreter_starts(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    assert terminated(begin(tmp_path, "app.cli", "worker", "--engine", "sim")) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("place", ["weakref.ref(key, sigterm)", "weakref.finalize(key, sigterm)", "Finalizer()"])
def test_sigterm_counts_where_exceptions_lead_nowhere(place):
    begun = f"""
import os, signal, sys, weakref
from process.signals import end_on_sigterm

def sigterm(*_):
    signal.raise_signal(signal.SIGTERM)

class Finalizer:
    __del__ = sigterm

end_on_sigterm()
key = Finalizer if "Finalizer" in sys.argv[1] else type("Key", (), {{}})()
kept = {place}
del key, kept
while True:
    signal.pause()
"""
    ended = subprocess.run(
        [sys.executable, "-c", begun, place],
        capture_output=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, b"")
