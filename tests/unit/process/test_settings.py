import subprocess
import sys
from pathlib import Path

import pytest

from planes.wire.errors import UnusableSetting
from process.settings import ProcessSettings, command_line, run

COMMAND = """
import os, signal, sys, time
from process.settings import command_line, run
from process.signals import end_on_sigterm

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from birth
app = command_line("mill", "")

@app.default
def main():
    try:
        os.kill(os.getpid(), int(sys.argv.pop()))
        time.sleep(60)
    finally:
        print("tidied up")

end_on_sigterm()
sys.exit(run(app))
"""


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_a_command_that_is_interrupted_tidies_up_and_says_nothing(number, status):
    argv = [sys.executable, "-c", COMMAND.replace("sys.argv.pop()", str(number))]
    done = subprocess.run(argv, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "tidied up\n", "")


def test_what_was_typed_is_repeated_without_passwords(capsys):
    app = command_line("mill", "")
    app.default(lambda: None)
    assert run(app, ["nats://u:s3cr3t@h:1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("headrace: ")
    assert "s3cr3t" not in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"etcd": "ftp://u:s3cr3t@x"}, r"--etcd is 'ftp://\*\*\*@x': etcd url"),
        ({"nats": "http://u:s3cr3t@x"}, r"--nats is 'http://\*\*\*@x': NATS url"),
        ({"namespace": "a.b"}, r"--namespace is 'a\.b': namespace"),
        ({"etcd": "http://u@x"}, "--etcd .* needs a user and a password"),
    ],
)
def test_an_address_that_cannot_be_used_stops_the_start_and_shows_no_password(changed, message):
    with pytest.raises(UnusableSetting, match=message) as refused:
        ProcessSettings(**changed)
    assert "s3cr3t" not in str(refused.value)
