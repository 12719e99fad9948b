import subprocess
import sys

from process.parent import Restarts

PROGRAM = """
import os, signal, socket, sys, time
from process.parent import Parent

def run(number, sockets, begun):
    {run}

sys.exit(Parent(2, lambda: [socket.create_server(("127.0.0.1", 0))], run).run())
"""


def _run(run, timeout_s=60):
    program = PROGRAM.format(run="\n    ".join(run.splitlines()))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_the_first_restart_is_at_once_and_pauses_grow_until_a_life_was_long():
    restarts = Restarts()
    assert [restarts.pause_s(1.0) for _ in range(7)] == [0, 1, 2, 5, 10, 30, 30]
    assert [restarts.pause_s(61.0), restarts.pause_s(1.0)] == [0, 1]


def test_one_that_never_begins_ends_all_with_its_status():
    ended = _run("if number == 1:\n    raise SystemExit(7)\nbegun()\nsignal.pause()")
    assert ended.returncode in (7, 143)  # whichever ended first: the other one gets SIGTERM
    assert "process.unusable" in ended.stdout + ended.stderr


def test_one_that_dies_is_started_again_with_its_socket_and_an_ending_is_passed_on():
    # Two connections in its socket: one of the process that was killed and one of its own.
    ended = _run(
        "def told(*_): raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "begun()\n"
        "if number == 2:\n"
        "    with socket.create_connection(sockets[0].getsockname()):\n"
        "        pass\n"
        "    sockets[0].setblocking(False)\n"
        "    try:\n"
        "        sockets[0].accept(); sockets[0].accept()\n"
        "    except BlockingIOError:\n"
        "        with socket.create_connection(sockets[0].getsockname()):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "signal.pause()"
    )
    assert ended.returncode == 0, ended.stderr
    assert (ended.stdout + ended.stderr).count("process.ended") == 1
