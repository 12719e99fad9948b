import time

import pytest

from app.cli.up import UpSettings, _announce, _gateway_child
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


def test_the_gateway_gets_the_policy_and_the_keys(tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-1"\n')
    settings = UpSettings(engine="sim", policy="dynamo", api_keys_file=keys)
    words = " ".join(_gateway_child(settings, "e", "n", tmp_path, 2).argv)
    assert f"--policy dynamo --api-keys-file {keys}" in words


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"policy": "no-such"}, "--policy is 'no-such'.*round_robin"),
        ({"api_keys_file": "/nowhere"}, "--api-keys-file is '/nowhere'.*cannot be read"),
    ],
)
def test_what_the_gateway_would_refuse_is_refused_at_once(changed, message):
    with pytest.raises(UnusableSetting, match=message):
        UpSettings(engine="sim", **changed)


def test_a_policy_of_ones_own_is_left_to_the_gateway():
    assert UpSettings(engine="sim", policy="my_module:Mine").policy == "my_module:Mine"
