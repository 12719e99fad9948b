"""Choosing a number format."""

import pytest

from workers.engine.make import native_dtype


@pytest.mark.parametrize(
    ("flags", "dtype"), [("avx512f avx512_vnni", "float32"), ("avx512_bf16", "bfloat16"), ("amx_bf16 x", "bfloat16")]
)
def test_a_cpu_without_native_bfloat16_computes_in_float32(tmp_path, flags, dtype):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    assert native_dtype(tmp_path / "cpuinfo", cpu_build="numpy") == dtype


def test_other_builds_take_the_model_s_own_format():
    assert native_dtype(cpu_build="no-such-distribution") == "auto"
