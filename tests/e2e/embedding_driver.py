"""What memory an embedding takes beside its own, with vLLM's code and with our plug-in's, as a share of its own."""

import json
import sys
from pathlib import Path

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from workers.vllm import plugin

VOCAB_SIZE, HIDDEN = 65_536, 512


def resident_bytes():
    """Of our own: pages of files come and go."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:"))


def told():
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, HIDDEN), requires_grad=False)
    method = UnquantizedEmbeddingMethod()
    states = torch.randn(2, HIDDEN)
    before = resident_bytes()
    method.process_weights_after_loading(layer)
    method.embedding(layer, torch.tensor([0, VOCAB_SIZE - 1]))
    looked_up = resident_bytes()
    products = [method.apply(layer, states) for _ in range(2)]
    multiplied = resident_bytes()
    expected = torch.nn.functional.linear(states, layer.weight)
    return {
        "looked_up": (looked_up - before) / layer.weight.nbytes,
        "multiplied": (multiplied - before) / layer.weight.nbytes,
        "is_right": all(torch.allclose(product, expected, atol=1e-3) for product in products),
    }


if __name__ == "__main__":
    vllms = told()
    plugin.BeforeLoading  # noqa: B018 - the name that an engine asks for first puts everything in its place
    sys.stdout.write(json.dumps({"vllm": vllms, "ours": told()}) + "\n")
