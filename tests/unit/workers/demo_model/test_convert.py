"""The converter's parts, on hand-made inputs; the whole conversion runs in the end-to-end tests."""

import jinja2.sandbox
import numpy as np
import pytest

from workers.demo_model.convert import (
    CHAT_TEMPLATE,
    DemoModelError,
    ensure_demo_model,
    merges,
    tensor_name,
    to_bfloat16,
)

NORMAL, CONTROL, BYTE = 1, 3, 6


def test_tensors_get_the_names_that_transformers_uses():
    assert tensor_name("token_embd.weight") == "model.embed_tokens.weight"
    assert tensor_name("output_norm.weight") == "model.norm.weight"
    assert tensor_name("blk.17.ffn_norm.weight") == "model.layers.17.pre_feedforward_layernorm.weight"


def test_bfloat16_rounds_to_nearest_with_ties_to_even():
    values = np.array([1.0, -2.5, 0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], dtype=np.float32)
    back = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    assert back.tolist() == [1.0, -2.5, 0.0, 1.0, 1 + 2**-6, 1 + 2**-7]


def test_merges_rank_by_score_and_leave_out_control_and_byte_tokens():
    tokens = ["<eos>", "<0x41>", "a", "b", "ab", "aba", "c"]
    kinds = [CONTROL, BYTE, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL]
    assert merges(tokens, [-9.0, -9.0, -3.0, -4.0, -2.0, -1.0, -5.0], kinds) == ["ab a", "a b"]


def render(messages, **more):
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, bos_token="<bos>", **more)


def test_the_chat_template_follows_gemmas_turns():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
    ]
    assert render(messages, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_converted_model_is_used_as_it_is(tmp_path):
    (tmp_path / "gemma-3-270m-v1").mkdir()
    said = []
    assert ensure_demo_model(tmp_path, progress=said.append) == tmp_path / "gemma-3-270m-v1"
    assert said == []


def test_without_its_package_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.demo_model.convert.find_spec", lambda name: None)
    with pytest.raises(DemoModelError, match=r"the extra cpu or cuda, name a --model, .* --engine sim"):
        ensure_demo_model(tmp_path)
