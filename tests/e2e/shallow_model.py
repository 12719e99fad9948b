"""The demo model's first layers alone: a fraction of the time for each token, where it does not matter what is said."""

import json
import re
import shutil

from safetensors.torch import load_file, save_file

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def write_shallow_model(demo_model, folder, *, num_layers):
    shutil.copytree(demo_model, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    assert num_layers < config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    weights = load_file(demo_model / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if (layer := LAYER.match(name)) is None or int(layer[1]) < num_layers
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
