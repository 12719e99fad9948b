import pytest

from workers.engine import EngineStartError
from workers.vllm_memory import available_bytes, check_memory

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  8388608 kB\nMemAvailable:    3145728 kB\n")
    (tmp_path / "model.safetensors").write_bytes(bytes(MIB))
    (tmp_path / "config.json").write_text('{"vocab_size": 2048, "hidden_size": 256}')
    return tmp_path


def test_a_container_s_limit_counts_where_it_is_lower(machine):
    assert available_bytes(machine, machine) == 3072 * MIB
    (machine / "memory.max").write_text("max\n")
    assert available_bytes(machine, machine) == 3072 * MIB
    (machine / "memory.max").write_text(f"{1024 * MIB}\n")
    (machine / "memory.current").write_text(f"{24 * MIB}\n")
    assert available_bytes(machine, machine) == 1000 * MIB


def test_too_little_memory_is_refused_with_the_numbers(machine):
    check_memory(machine, 256 * MIB, dtype="float32", proc=machine, cgroup=machine)
    with pytest.raises(
        EngineStartError, match=r"needs about 3404 MiB \(weights 4, KV cache 2000, .* 3072 MiB are avail"
    ):
        check_memory(machine, 2000 * MIB, dtype="float32", proc=machine, cgroup=machine)
