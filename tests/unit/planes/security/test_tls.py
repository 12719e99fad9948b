"""Who gets through a handshake, with what, and that files which change count from the next handshake on."""

import os
import ssl

import pytest
from structlog.testing import capture_logs

from app.cli.certs import CertsSettings, make_certs
from planes.security.files import UnusableFile
from planes.security.tls import TlsFiles, client_tls, gateway_tls, grpc_files, http_tls, worker_tls


def files(certs, which="plane"):
    return TlsFiles(certs.ca, *getattr(certs, which))


def shake_hands(client, server, *, name=None):
    """Both ends, after the handshake.  Raises:  ssl.SSLError, of whoever refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_side=False, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    ends[1].write(b"known")
    assert ends[0].read(5) == b"known"
    return ends


def serial(end):
    return end.getpeercert()["serialNumber"]


def test_members_of_a_fleet_know_each_other_whatever_their_addresses_are(certs):
    gateway, worker = shake_hands(gateway_tls(files(certs))(), worker_tls(files(certs))())
    assert (gateway.version(), worker.version()) == ("TLSv1.3", "TLSv1.3")
    assert gateway.getpeercert() == worker.getpeercert() != {}


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (lambda certs, _: TlsFiles(certs.ca), "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        (lambda certs, strangers: TlsFiles(certs.ca, *strangers.plane), "CERTIFICATE_VERIFY_FAILED"),
        (lambda certs, _: TlsFiles(certs.ca, *certs.server), "CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_a_worker_turns_away_who_shows_no_member_s_certificate(certs, strangers, client, reason):
    with pytest.raises(ssl.SSLError, match=reason):
        shake_hands(gateway_tls(client(certs, strangers))(), worker_tls(files(certs))())


def test_a_gateway_turns_away_a_worker_of_another_ca(certs, strangers):
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(gateway_tls(files(certs))(), worker_tls(files(strangers))())


def test_servers_are_known_by_name(certs):
    client, server = client_tls(TlsFiles(certs.ca))(), http_tls(*certs.server)
    shake_hands(client, server, name="localhost")
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(client, server, name="elsewhere")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_new_https_connections_get_a_renewed_certificate(tmp_path, name):
    certs = make_certs(tmp_path, CertsSettings())
    client, server = client_tls(TlsFiles(certs.ca))(), http_tls(*certs.server)
    before, _ = shake_hands(client, server, name=name)
    make_certs(tmp_path, CertsSettings())
    after, _ = shake_hands(client, server, name=name)
    assert serial(before) != serial(after)


def test_a_new_ca_counts_for_new_streams_and_the_old_one_no_longer(tmp_path, strangers):
    certs = make_certs(tmp_path, CertsSettings())
    own = files(certs)
    worker, gateway = worker_tls(own), gateway_tls(own)
    running, _ = shake_hands(gateway(), worker())
    old = gateway()
    for mine, theirs in zip((certs.ca, *certs.plane), (strangers.ca, *strangers.plane), strict=True):
        mine.write_bytes(theirs.read_bytes())
    shake_hands(gateway(), worker())
    assert running.version() == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        shake_hands(old, worker())


def test_half_a_renewal_leaves_the_old_pair_in_force(tmp_path, strangers):
    certs = make_certs(tmp_path, CertsSettings())
    client, server = client_tls(TlsFiles(certs.ca))(), http_tls(*certs.server)
    old = serial(shake_hands(client, server, name="localhost")[0])
    certs.server[0].write_bytes(strangers.server[0].read_bytes())
    with capture_logs() as logs:
        assert serial(shake_hands(client, server, name="localhost")[0]) == old
    assert [line["event"] for line in logs] == ["secret_files.unusable"]


def test_grpc_gets_what_the_files_hold_by_now(tmp_path):
    certs = make_certs(tmp_path, CertsSettings())
    current = grpc_files(files(certs))
    before = current()
    assert before == tuple(path.read_bytes() for path in (certs.ca, certs.plane[1], certs.plane[0]))
    make_certs(tmp_path, CertsSettings())
    assert current()[0] == before[0]
    assert current()[1:] != before[1:]


def test_a_resumed_session_is_no_way_around_the_certificate(certs):
    assert worker_tls(files(certs))().num_tickets == 0


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ("ca", "holds no certificate of a CA"),
        ("cert", "is no certificate for the key"),
        ("key", "is no certificate for the key"),
    ],
)
@pytest.mark.parametrize("content", [None, "", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_an_unusable_file_is_named_at_the_start(certs, tmp_path, spoilt, said, content):
    bad = tmp_path / "bad.pem"
    if content is not None:
        bad.write_text(content)
    chosen = {"ca": certs.ca, "cert": certs.plane[0], "key": certs.plane[1]} | {spoilt: bad}
    with pytest.raises(UnusableFile, match=said) as refused:
        worker_tls(TlsFiles(**chosen))
    assert str(bad) in str(refused.value)


def test_a_key_that_does_not_fit_or_is_encrypted_is_refused(certs, strangers, tmp_path):
    with pytest.raises(UnusableFile, match="key values mismatch"):
        worker_tls(TlsFiles(certs.ca, certs.plane[0], strangers.plane[1]))
    encrypted = tmp_path / "key"
    os.system(f"openssl ec -in {certs.plane[1]} -aes128 -passout pass:xyzw -out {encrypted} 2>/dev/null")
    with pytest.raises(UnusableFile, match="the key is encrypted"):
        worker_tls(TlsFiles(certs.ca, certs.plane[0], encrypted))


def test_half_a_pair_is_refused(certs):
    with pytest.raises(ValueError, match="together"):
        TlsFiles(certs.ca, certs.plane[0])
