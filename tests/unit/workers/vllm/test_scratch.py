import os

from workers.vllm.scratch import Scratch


def test_a_folder_is_there_until_it_is_removed(tmp_path):
    scratch = Scratch(tmp_path)
    (scratch.path / "failure").write_text("so")
    scratch.remove()
    assert list(tmp_path.iterdir()) == []


def test_folders_in_use_stay_and_those_of_killed_workers_go(tmp_path):
    killed, living = Scratch(tmp_path), Scratch(tmp_path)
    os.close(killed._lock)  # what the kernel does
    other = tmp_path / "headrace-etcd-1"
    other.mkdir()
    latest = Scratch(tmp_path)
    assert set(tmp_path.iterdir()) == {living.path, latest.path, other}
    living.remove()
    latest.remove()
