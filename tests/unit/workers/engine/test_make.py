"""Engines as the settings ask for them."""

import pytest

from planes.wire.errors import UnusableSetting
from planes.wire.messages import WorkerId
from workers.engine.make import make_engine, native_dtype
from workers.settings import WorkerSettings


@pytest.mark.parametrize(
    ("flags", "dtype"), [("avx512f avx512_vnni", "float32"), ("avx512_bf16", "bfloat16"), ("amx_bf16 x", "bfloat16")]
)
def test_a_cpu_without_native_bfloat16_computes_in_float32(tmp_path, flags, dtype):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    assert native_dtype(tmp_path / "cpuinfo", cpu_build="numpy") == dtype


def test_other_builds_take_the_model_s_own_format():
    assert native_dtype(cpu_build="no-such-distribution") == "auto"


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_simulated_engine_tells_in_which_order_it_computes(is_asked):
    settings = WorkerSettings(engine="sim", sim_shortest_first=is_asked)
    assert make_engine(settings, WorkerId("w"), vocab_size=256).facts.is_shortest_first is is_asked


def test_a_server_is_not_adopted_by_a_worker(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnusableSetting, match="headrace adopt http"):
        make_engine(WorkerSettings(engine="adopted", model=tmp_path), WorkerId("w"), vocab_size=256)
