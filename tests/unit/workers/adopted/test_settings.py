import pytest

from planes.wire.errors import UnusableSetting
from planes.wire.messages import Role
from workers.adopted.settings import AdoptSettings


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_what_is_set_counts_for_the_worker(directory):
    settings = AdoptSettings(
        role="decode", max_batch=4, lease_s=60, etcd="http://10.0.0.1:2379", namespace="blue", drain_s=5.0
    )
    worker = settings.as_worker("demo", directory)
    assert (worker.engine, worker.worker_role, worker.model_name, worker.model_path) == (
        "adopted",
        Role.DECODE,
        "demo",
        directory,
    )
    assert (worker.max_batch, worker.lease_s, worker.etcd, worker.namespace) == (4, 60, "http://10.0.0.1:2379", "blue")
    assert (worker.drain_s, worker.may_pull) == (5.0, False)


def test_a_server_without_a_connector_hands_nothing_over(directory):
    assert AdoptSettings(handover="none").as_worker("demo", directory).handover_mode is None


def test_the_server_s_key_is_in_a_file(tmp_path):
    (tmp_path / "key").write_text("sesame\n")
    assert AdoptSettings(server_key_file=tmp_path / "key").server_key() == "sesame"
    assert AdoptSettings().server_key() == ""


@pytest.mark.parametrize("content", [b"", b"one\ntwo", b"\xff\xfe"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UnusableSetting, match="--server-key-file"):
        AdoptSettings(server_key_file=tmp_path / "key")


def test_a_missing_key_file_and_a_negative_wait_are_refused(tmp_path):
    with pytest.raises(UnusableSetting, match="--server-key-file"):
        AdoptSettings(server_key_file=tmp_path / "nothing")
    with pytest.raises(UnusableSetting, match="--wait-s"):
        AdoptSettings(wait_s=-1.0)
