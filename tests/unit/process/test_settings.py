import subprocess
import sys
from pathlib import Path

import pytest

from planes.security.tls import TlsFiles
from planes.wire.errors import UnusableSetting
from process.settings import EtcdSettings, ProcessSettings, command_line, run

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


@pytest.mark.parametrize("argument", ["--etcd=http://u:s3cr3t@h", "--nats=nats://s3cr3t@h", "--nats"])
def test_a_secret_that_ps_would_show_is_refused_without_it(capsys, argument):
    app = command_line("mill", "")
    app.default(lambda *, etcd="", nats="": None)
    assert run(app, [argument, *(["nats://u:s3cr3t@h"] if "=" not in argument else [])]) == 2
    said = capsys.readouterr()
    assert "s3cr3t" not in said.out + said.err
    assert f"HEADRACE_{argument[2:6].upper()}" in said.err
    assert "password-file" in said.err


def test_a_secret_by_variable_is_none_that_ps_shows(monkeypatch):
    monkeypatch.setenv("HEADRACE_ETCD", "http://u:s3cr3t@h")
    app, heard = command_line("mill", ""), []
    app.default(lambda *, etcd="": heard.append(etcd))
    with pytest.raises(SystemExit, match="0"):
        run(app, [])
    assert heard == ["http://u:s3cr3t@h"]


def test_one_set_of_files_is_for_all_planes_and_a_plane_s_own_goes_before(certs, strangers):
    cert, key = certs.plane
    own = {"plane_ca": certs.ca, "plane_cert": cert, "plane_key": key, "etcd": "https://e", "nats": "tls://n"}
    security = ProcessSettings(**own).security
    everywhere = TlsFiles(certs.ca, cert, key)
    assert (security.etcd.tls, security.nats.tls, security.streams.tls) == (everywhere, everywhere, everywhere)
    theirs = {"etcd_ca": strangers.ca, "nats_cert": strangers.plane[0], "nats_key": strangers.plane[1]}
    security = ProcessSettings(**own, **theirs).security
    assert security.etcd.tls == TlsFiles(strangers.ca, cert, key)
    assert security.nats.tls == TlsFiles(certs.ca, *strangers.plane)
    assert security.streams.tls == everywhere


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"plane_cert": "c"}, "--plane-cert is 'c': it needs --plane-key"),
        ({"etcd_key": "k", "etcd": "https://e"}, "--etcd-key is 'k': it needs --etcd-cert"),
        ({"etcd_user": "u"}, "--etcd-user is 'u': it needs --etcd-password-file"),
        ({"nats_password_file": "p"}, "--nats-password-file is 'p': it needs --nats-user"),
        ({"etcd_ca": "c"}, "--etcd-ca is 'c': it needs an --etcd that begins with https://"),
        ({"nats_ca": "c"}, "--nats-ca is 'c': it needs a --nats that begins with tls://"),
        ({"plane_ca": "nothing", "etcd": "https://e"}, "--etcd is 'https://e': nothing: holds no certificate of a CA"),
        ({"nats_token_file": "nothing"}, "nothing: cannot be read"),
        ({"nats_token_file": "t", "nats_nkey_file": "n"}, "--nats-token-file is 't': --nats-nkey-file names a secret"),
        ({"nats_token_file": "t", "nats": "nats://u:p@h"}, "--nats-token-file is 't': --nats names a secret"),
        ({"etcd_user": "u", "etcd_password_file": "p", "etcd": "http://v:q@e"}, "--etcd names a user, too"),
        ({"stream_token_file": "nothing"}, "--stream-token-file is 'nothing': nothing: cannot be read"),
    ],
)
def test_a_wrong_choice_of_keys_stops_the_start(changed, message):
    paths = {
        name: Path(value) if name.endswith(("_file", "_ca", "_cert", "_key")) else value
        for name, value in changed.items()
    }
    with pytest.raises(UnusableSetting, match=message) as refused:
        ProcessSettings(**paths)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize("content", ["SUMILL", "", "s3cr3t"])
@pytest.mark.parametrize("name", ["nats_nkey_file", "nats_credentials_file"])
def test_a_file_that_holds_no_nkey_is_refused_and_not_shown(tmp_path, name, content):
    file = tmp_path / "nkey"
    file.write_text(content)
    with pytest.raises(UnusableSetting, match=str(file)) as refused:
        ProcessSettings(**{name: file})
    assert "s3cr3t" not in str(refused.value)


def test_settings_hold_names_of_files_and_no_secret(certs):
    settings = ProcessSettings(stream_token_file=certs.token)
    assert certs.token.read_text().strip() not in repr(settings) + repr(settings.security)
    assert EtcdSettings().etcd_security.user is None
