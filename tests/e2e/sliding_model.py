"""A small model of Gemma 3's kind with random weights: layers with a sliding window among layers without.

vLLM keeps their KV caches in groups that hold different blocks of one prompt. Every part of a layer adds to the rest
in equal measure and the output layer is its own, so that each token depends on much of what came before it.
"""

import json

import numpy as np
from safetensors.numpy import save_file

WINDOW_TOKENS = 64
VOCAB_SIZE = 4096
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2
HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 128, 4, 2, 32
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "torch_dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": len(LAYER_TYPES),
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": WINDOW_TOKENS,
    "layer_types": LAYER_TYPES,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES = {
    "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


def write_sliding_model(folder):
    rng = np.random.default_rng(0)

    def matrix(*shape):
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN),
        "lm_head.weight": matrix(VOCAB_SIZE, HIDDEN),
        "model.norm.weight": np.zeros(HIDDEN, np.float32),
    }
    for layer in range(len(LAYER_TYPES)):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.{part}.weight": matrix(*shape) for part, shape in SHAPES.items()}
        tensors |= {f"{name}.{norm}_layernorm.weight": np.zeros(HIDDEN, np.float32) for norm in NORMS}
        # 1 more than this is the factor: sharp attention, so that single tokens matter
        tensors |= {
            f"{name}.self_attn.{norm}.weight": np.full(HEAD_DIM, 0.7, np.float32) for norm in ("q_norm", "k_norm")
        }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
