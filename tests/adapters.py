"""LoRA adapters made for tests: as many bytes as there must be, or random weights that change every answer."""

import json

TARGETS = ("q_proj", "v_proj")


def write_named_adapter(directory):
    """For the simulated engine, which reads no weights."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    return directory


def write_random_adapter(directory, model, *, seed, rank=8, scale=0.3):
    """As PEFT writes them, for a model of Llama's shape."""
    import torch  # noqa: PLC0415 - only where vLLM is
    from safetensors.torch import save_file  # noqa: PLC0415

    shape = json.loads((model / "config.json").read_text())
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    sizes = {"q_proj": heads * head, "v_proj": shape["num_key_value_heads"] * head}
    random, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(shape["num_hidden_layers"]):
        for target, size in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=random) * scale
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size, rank, generator=random) * scale
    directory.mkdir(parents=True)
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    return directory
