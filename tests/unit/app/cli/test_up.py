import asyncio
import contextlib
import time
from types import SimpleNamespace

import pytest

from app.cli import servers, up
from app.cli.up import UpSettings, _announce, _exported, _gateway_child, _servers, _worker_children
from planes.wire.errors import UnusableSetting


def announced(capsys, tmp_path, **settings):
    _announce(UpSettings(engine="sim", **settings), "sim", time.monotonic(), tmp_path)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_printed_urls_can_be_used_on_this_machine(capsys, tmp_path, host, url):
    text = announced(capsys, tmp_path, host=host)
    assert f"listens on {url}\n" in text
    assert f"curl -N {url}/v1/chat/completions" in text


def test_the_printed_line_asks_for_a_key_where_one_is_needed(capsys, tmp_path):
    assert "authorization" not in announced(capsys, tmp_path)
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-1"\n')
    text = announced(capsys, tmp_path, api_keys_file=keys)
    assert "    -H 'authorization: Bearer YOUR_KEY' \\\n" in text


def test_keys_in_etcd_are_asked_for_and_told_how_to_make(capsys, tmp_path):
    text = announced(capsys, tmp_path, api_keys=True, host="0.0.0.0")
    assert "authorization: Bearer YOUR_KEY" in text
    assert "headrace keys create NAME makes a key and shows it, once; they are gone when this ends" in text
    assert "warning" not in text
    assert "they are gone" not in announced(capsys, tmp_path, api_keys=True, etcd="http://e:1")


def test_the_console_s_address_is_told_where_there_is_one(capsys, tmp_path):
    assert "the console is at http://127.0.0.1:8000/console\n" in announced(capsys, tmp_path)
    assert "/console" not in announced(capsys, tmp_path, console=False)
    text = announced(capsys, tmp_path, admin_port=9000)
    assert "the console is at http://127.0.0.1:9000/console\n" in text
    assert "ask at http://127.0.0.1:9000: --url" in text


def test_the_gateway_gets_what_is_for_operators(tmp_path):
    settings = UpSettings(engine="sim", api_keys=True, console=False, admin_port=9000)
    words = " ".join(_gateway_child(settings, "e", "n", tmp_path, 2).argv)
    assert "--api-keys --no-console --admin-port 9000" in words


def test_the_gateway_gets_the_policy_and_the_keys(tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-1"\n')
    settings = UpSettings(engine="sim", policy="dynamo", api_keys_file=keys)
    words = " ".join(_gateway_child(settings, "e", "n", tmp_path, 2).argv)
    assert f"--policy dynamo --api-keys-file {keys}" in words


async def test_etcd_and_nats_never_take_a_port_that_the_gateway_will_have(monkeypatch, tmp_path):
    asked = []

    @contextlib.asynccontextmanager
    async def server(folder, port, **certs):
        asked.append(port)
        yield SimpleNamespace(url=f"there:{port}", ended=asyncio.Event().wait)

    first = servers.free_port("the gateway", 0)
    monkeypatch.setattr(servers, "_LASTING_PORTS", range(first, first + 4))
    monkeypatch.setattr(servers, "_MAX_TRIES", 2)
    monkeypatch.setattr(up, "etcd_server", server)
    monkeypatch.setattr(up, "nats_server", server)
    settings = UpSettings(engine="sim", port=first, admin_port=first + 3)
    for _ in range(20):
        async with contextlib.AsyncExitStack() as stack:
            await _servers(settings, tmp_path, stack, None)
    assert len(asked) == 40
    assert set(asked) <= {first + 1, first + 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"policy": "no-such"}, "--policy is 'no-such'.*round_robin"),
        ({"api_keys_file": "/nowhere"}, "--api-keys-file is '/nowhere'.*cannot be read"),
        ({"admin_port": 0}, "--admin-port is 0: a port is 1"),
        ({"admin_port": 8000}, "--admin-port is 8000: it must differ"),
    ],
)
def test_what_the_gateway_would_refuse_is_refused_at_once(changed, message):
    with pytest.raises(UnusableSetting, match=message):
        UpSettings(engine="sim", **changed)


def test_a_policy_of_ones_own_is_left_to_the_gateway():
    assert UpSettings(engine="sim", policy="my_module:Mine").policy == "my_module:Mine"


@pytest.mark.parametrize(
    ("host", "is_told"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("10.0.0.1", True)],
)
def test_a_gateway_that_others_reach_without_a_key_is_told(capsys, tmp_path, host, is_told):
    assert announced(capsys, tmp_path, host=host).count("--api-keys-file") == is_told
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-1"\n')
    assert "--api-keys-file" not in announced(capsys, tmp_path, host=host, api_keys_file=keys)


def test_what_to_export_shows_no_password():
    shown = _exported("http://u:s3cr3t@e:1", "nats://n:2", "ns")
    assert shown == "HEADRACE_NATS=nats://n:2 HEADRACE_NAMESPACE=ns"


def test_children_get_addresses_by_variable_and_only_what_they_read(tmp_path, monkeypatch):
    for name in ("HEADRACE_MAX_BATCH", "HEADRACE_QUEUE_LIMIT"):
        monkeypatch.setenv(name, "7")
    settings = UpSettings(engine="sim", prefill=0)
    (worker,) = _worker_children(settings, "http://u:s3cr3t@e", "nats://n", tmp_path)
    gateway = _gateway_child(settings, "http://u:s3cr3t@e", "nats://n", tmp_path, 1)
    for child, own, other in ((worker, "MAX_BATCH", "QUEUE_LIMIT"), (gateway, "QUEUE_LIMIT", "MAX_BATCH")):
        assert "s3cr3t" not in " ".join(child.argv)
        assert child.environment["HEADRACE_ETCD"] == "http://u:s3cr3t@e"
        assert child.environment[f"HEADRACE_{own}"] == "7"
        assert f"HEADRACE_{other}" not in child.environment
        assert child.environment["HEADRACE_DEAD_AFTER_S"] == "20"
    monkeypatch.setenv("HEADRACE_DEAD_AFTER_S", "5")
    gateway = _gateway_child(settings, "e", "nats://n", tmp_path, 1)
    assert gateway.environment["HEADRACE_DEAD_AFTER_S"] == "5"
    monkeypatch.delenv("HEADRACE_DEAD_AFTER_S")
    joining = UpSettings(engine="sim", etcd="http://e:1")
    assert "HEADRACE_DEAD_AFTER_S" not in _gateway_child(joining, "e", "nats://n", tmp_path, 1).environment


@pytest.mark.parametrize("given", [{"etcd": "http://e:1"}, {"nats": "nats://n:2"}, {"tls_cert": "c", "tls_key": "k"}])
def test_secure_is_for_what_it_starts_itself(given):
    with pytest.raises(UnusableSetting, match=f"--{next(iter(given)).replace('_', '-')} "):
        UpSettings(engine="sim", secure=True, **given)


def test_a_gateway_is_told_its_certificate_and_that_it_may_be_open(tmp_path):
    settings = UpSettings(engine="sim", tls_cert=tmp_path / "c", tls_key=tmp_path / "k", insecure=True)
    command = " ".join(_gateway_child(settings, "http://e", "nats://n", tmp_path, 1).argv)
    assert f"--tls-cert {tmp_path / 'c'} --tls-key {tmp_path / 'k'} --insecure" in command
