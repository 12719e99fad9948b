"""The set of certificates for trying out."""

import stat

import pytest
from cryptography import x509

from app.cli.certs import CertsNotMade, CertsSettings, make_certs, told
from planes.wire.errors import UnusableSetting


def read(file):
    return x509.load_pem_x509_certificate(file.read_bytes())


def names(file):
    found = read(file).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def test_keys_and_the_token_are_for_their_owner_alone(certs):
    secret = {file.name: stat.S_IMODE(file.stat().st_mode) for file in certs.folder.iterdir()}
    assert secret == {
        "ca.pem": 0o644,
        "ca.key": 0o600,
        "server.pem": 0o644,
        "server.key": 0o600,
        "plane.pem": 0o644,
        "plane.key": 0o600,
        "stream-token": 0o600,
    }
    assert stat.S_IMODE(certs.folder.stat().st_mode) == 0o700


def test_a_second_time_renews_the_certificates_alone(tmp_path):
    first = make_certs(tmp_path, CertsSettings())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    make_certs(tmp_path, CertsSettings(host=("gateway.example", "10.0.0.1")))
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"ca.pem", "ca.key", "stream-token"}
    assert names(first.server[0]) == ["gateway.example", "10.0.0.1"]
    assert read(first.server[0]).issuer == read(first.ca).subject


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "ca.pem").write_text("my own")
    with pytest.raises(CertsNotMade, match=r"ca\.key: No such file"):
        make_certs(tmp_path, CertsSettings())
    (tmp_path / "ca.key").write_text("my own")
    with pytest.raises(CertsNotMade, match="another folder gets a new one"):
        make_certs(tmp_path, CertsSettings())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ca.key", "ca.pem"]


@pytest.mark.parametrize(
    ("changes", "name"), [({"days": 0}, "--days"), ({"host": ()}, "--host"), ({"host": ("mühle",)}, "--host")]
)
def test_settings_that_cannot_be_used_are_named(changes, name):
    with pytest.raises(UnusableSetting, match=name):
        CertsSettings(**changes)


def test_the_terminal_is_told_flags_and_no_secret(certs):
    said = told(certs)
    assert f"--plane-ca {certs.ca}" in said
    assert f"--tls-cert {certs.server[0]}" in said
    assert certs.token.read_text().strip() not in said
