"""What may listen where others reach it."""

from pathlib import Path

import pytest

from app.settings import GatewaySettings
from process.exposure import OpenToOthers, refuse_open_gateway, refuse_open_worker
from workers.settings import WorkerSettings

ELSEWHERE = {"etcd": "http://e:2379", "nats": "nats://n:4222"}
PUBLIC = ["0.0.0.0", "::", "", "10.0.0.1", "gateway.example"]


def secured(certs):
    """Settings with which nobody is let in who does not belong."""
    cert, key = certs.plane
    planes = {"etcd": "https://e:2379", "nats": "tls://n:4222"}
    return planes | {"plane_ca": certs.ca, "plane_cert": cert, "plane_key": key}


def gateway(has_keys=False, host="0.0.0.0", admin_host=None, **settings):
    refuse_open_gateway(GatewaySettings(**settings), host, has_keys=has_keys, admin_host=admin_host)


def worker(host="0.0.0.0", **settings):
    refuse_open_worker(WorkerSettings(engine="sim", **settings), host)


def reasons(refuse, **settings):
    with pytest.raises(OpenToOthers) as refused:
        refuse(**settings)
    return str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_what_only_this_machine_reaches_may_be_open(host):
    gateway(host=host, **ELSEWHERE)
    worker(host=host, **ELSEWHERE)


@pytest.mark.parametrize("host", PUBLIC)
def test_a_gateway_without_keys_is_not_for_others(host):
    said = reasons(gateway, host=host)
    assert "--api-keys-file" in said
    assert "--insecure" in said
    assert "etcd" not in said


def test_a_gateway_with_keys_whose_planes_are_on_this_machine_may_be_for_others():
    gateway(has_keys=True)


@pytest.mark.parametrize("host", PUBLIC)
def test_nor_is_its_port_for_operators(host):
    said = reasons(gateway, host="127.0.0.1", admin_host=host)
    assert said.startswith(f"--admin-host {host or repr('')} is")
    assert "--api-keys-file" in said
    gateway(host="127.0.0.1", admin_host=host, has_keys=True)
    gateway(host="127.0.0.1", admin_host=host, insecure=True)
    gateway(host="127.0.0.1", admin_host="127.0.0.1")


def test_every_open_plane_is_named_with_what_to_do():
    said = reasons(gateway, has_keys=True, **ELSEWHERE)
    for word in (
        "http://e:2379",
        "--etcd-user",
        "nats://n:4222",
        "--nats-token-file",
        "registered",
        "--stream-token-file",
    ):
        assert word in said
    assert "--api-keys-file" not in said
    said = reasons(worker, **ELSEWHERE)
    for word in ("http://e:2379", "nats://n:4222", "taken for a gateway", "--plane-ca"):
        assert word in said


def test_a_secured_fleet_may_be_for_others(certs):
    gateway(has_keys=True, **secured(certs))
    worker(**secured(certs))


def test_a_worker_with_a_token_is_open_to_nobody_else(certs):
    assert "taken for a gateway" in reasons(worker)
    worker(stream_token_file=certs.token)


@pytest.mark.parametrize(
    ("left_open", "word"),
    [
        ({"etcd": "http://e:2379"}, "etcd at"),
        ({"nats": "nats://n:4222"}, "NATS at"),
        ({"plane_cert": None, "plane_key": None}, "registered"),
    ],
)
def test_one_open_plane_is_enough(certs, left_open, word):
    assert word in reasons(gateway, has_keys=True, **secured(certs) | left_open)


def test_tls_without_anything_to_show_keeps_nobody_out(certs):
    only_ca = {"etcd": "https://e", "nats": "tls://n", "plane_ca": certs.ca, "stream_token_file": certs.token}
    said = reasons(worker, **only_ca)
    assert "etcd at" in said
    assert "NATS at" in said


@pytest.mark.parametrize("way", ["url", "file"])
def test_a_password_keeps_others_out_over_tls_alone(certs, tmp_path, way):
    password = tmp_path / "password"
    password.write_text("p")
    own = {"etcd": "https://u:p@e", "nats": "tls://u:p@n"}
    if way == "file":
        own = {"etcd": "https://e", "nats": "tls://n", "etcd_user": "u", "nats_user": "u"}
        own |= {"etcd_password_file": password, "nats_password_file": password}
    worker(**own, stream_token_file=certs.token)
    plain = {
        name: value.replace("https", "http").replace("tls", "nats") if isinstance(value, str) else value
        for name, value in own.items()
    }
    assert "etcd at" in reasons(worker, **plain, stream_token_file=certs.token)


def test_no_reason_shows_a_password():
    said = reasons(worker, etcd="http://u:s3cr3t@e", nats="nats://s3cr3t@n")
    assert "s3cr3t" not in said


def test_who_says_so_may_be_open():
    gateway(insecure=True, **ELSEWHERE)
    worker(insecure=True, **ELSEWHERE)


def test_a_file_of_keys_is_what_counts_as_keys():
    assert GatewaySettings(api_keys_file=Path("k")).has_keys
    assert not GatewaySettings().has_keys
