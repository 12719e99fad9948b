"""A small model of BERT's kind with random weights: each token looks at all others, so no layer keeps a KV cache."""

import json

import numpy as np
from safetensors.numpy import save_file

VOCAB_SIZE, HIDDEN, INTERMEDIATE, NUM_LAYERS, MOST_TOKENS = 512, 64, 128, 2, 512
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "torch_dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": MOST_TOKENS,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "matryoshka_dimensions": [16, 32],
}
EMBEDDINGS = {"word": VOCAB_SIZE, "position": MOST_TOKENS, "token_type": 2}
SHAPES = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (INTERMEDIATE, HIDDEN),
    "output.dense": (HIDDEN, INTERMEDIATE),
}


def write_encoder_model(folder):
    rng = np.random.default_rng(0)

    def matrix(*shape):
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    def norm(name):
        return {f"{name}.weight": np.ones(HIDDEN, np.float32), f"{name}.bias": np.zeros(HIDDEN, np.float32)}

    tensors = {f"embeddings.{name}_embeddings.weight": matrix(size, HIDDEN) for name, size in EMBEDDINGS.items()}
    tensors |= norm("embeddings.LayerNorm")
    for layer in (f"encoder.layer.{number}" for number in range(NUM_LAYERS)):
        tensors |= {f"{layer}.{part}.weight": matrix(*shape) for part, shape in SHAPES.items()}
        tensors |= {f"{layer}.{part}.bias": np.zeros(shape[0], np.float32) for part, shape in SHAPES.items()}
        tensors |= norm(f"{layer}.attention.output.LayerNorm") | norm(f"{layer}.output.LayerNorm")
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
