from pathlib import Path

import pytest

from app.settings import GatewaySettings
from planes.streams.protocol import StreamLimits
from planes.wire.errors import UnusableSetting


def test_a_gateway_needs_no_settings():
    settings = GatewaySettings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.etcd, settings.nats) == ("http://127.0.0.1:2379", "nats://127.0.0.1:4222")
    assert settings.api_keys_file is None
    assert settings.stream_limits == StreamLimits()


def test_tokenizer_files_are_kept_where_everything_else_is(monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", "/elsewhere")
    assert GatewaySettings().assets_dir == Path("/elsewhere/assets")
    assert GatewaySettings(cache_dir=Path("~/mine")).assets_dir == Path.home() / "mine"


def test_the_heartbeat_of_streams_is_the_one_set():
    assert GatewaySettings(heartbeat_s=0.5, dead_after_s=4.0).stream_limits == StreamLimits(ping_s=0.5, dead_s=4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": -1}, "--port is -1: a port is 0 to 65535"),
        ({"port": 65536}, "--port is 65536"),
        *(
            ({name: 0}, f"--{name.replace('_', '-')} is 0: it must be 1 or more")
            for name in ("queue_limit", "max_attempts", "max_body_bytes", "slow_client_bytes")
        ),
        *(
            ({name: value}, f"--{name.replace('_', '-')} is {value!r}: it must be more than 0 seconds")
            for name in ("request_timeout_s", "heartbeat_s", "dead_after_s", "slo_ttft_s")
            for value in (0.0, -1.0, float("nan"))
        ),
        *(
            ({name: value}, f"--{name.replace('_', '-')} is {value!r}: it must be 0 seconds or more")
            for name in ("drain_delay_s", "drain_s", "replacement_s")
            for value in (-0.1, float("nan"))
        ),
        ({"heartbeat_s": 3.0}, "--dead-after-s is 3.0: it must exceed --heartbeat-s (3.0)"),
        ({"etcd": "ftp://x"}, "--etcd is 'ftp://x': etcd url 'ftp://x' must look like"),
        ({"tls_cert": Path("c.pem")}, "--tls-cert is 'c.pem': it needs --tls-key"),
        ({"tls_key": Path("k.pem")}, "--tls-key is 'k.pem': it needs --tls-cert"),
        (
            {"tls_cert": Path("/no.pem"), "tls_key": Path("/no.key")},
            "--tls-cert is '/no.pem': /no.pem: is no certificate",
        ),
        ({"nats": "x:4222"}, "--nats is 'x:4222': NATS url 'x:4222' must look like"),
        ({"namespace": "a/b"}, "--namespace is 'a/b': namespace 'a/b' must be 1 to 64"),
    ],
)
def test_an_unusable_setting_is_named_with_its_value_and_what_is_allowed(changes, message):
    with pytest.raises(UnusableSetting) as refused:
        GatewaySettings(**changes)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "changes", [{"port": 0}, {"drain_s": 0.0, "replacement_s": 0.0, "sse_keepalive_s": 0.0}, {"slo_ttft_s": None}]
)
def test_what_is_at_a_limit_is_taken(changes):
    settings = GatewaySettings(**changes)
    assert {name: getattr(settings, name) for name in changes} == changes
