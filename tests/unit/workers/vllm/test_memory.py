import pytest

from workers.engine.base import EngineStartError
from workers.vllm.memory import available_bytes, check_memory

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  8388608 kB\nMemAvailable:    3145728 kB\n")
    header = b'{"__metadata__":{},"small":{"data_offsets":[0,1048576]},"large":{"data_offsets":[1048576,4194304]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * MIB))
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
        EngineStartError, match=r"needs about 3414 MiB \(weights 14, KV cache 2000, .* 3072 MiB are avail"
    ):
        check_memory(machine, 2000 * MIB, dtype="float32", proc=machine, cgroup=machine)


def test_a_broken_file_is_named(machine):
    (machine / "model.safetensors").write_bytes(bytes(16))
    with pytest.raises(EngineStartError, match=r"model.safetensors is no file of safetensors"):
        check_memory(machine, MIB, dtype="float32", proc=machine, cgroup=machine)
