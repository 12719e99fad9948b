"""The demo model with thoughts: its chat template opens them, and two tokens that nobody uses become their tags.

To the model the opening tag is the word First, so that it begins a thought, and the closing tag is a full stop, so
that the thought ends with its first sentence.
"""

import json
import re
import shutil

from safetensors.torch import load_file, save_file

THINK, END_THINK = 7, 8
TAGS = {THINK: "<think>", END_THINK: "</think>"}
LIKE = {THINK: "ĠFirst", END_THINK: "."}
OPENING = "{{- '<|im_start|>assistant\\n<think>\\n' ~ ('\\n</think>\\n\\n' if enable_thinking is false else '') -}}"

RESPONSES = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {"thinking": {"open": TAGS[THINK], "close": TAGS[END_THINK]}, "content": {}},
}
"""The same for vLLM's parser that goes by what a checkpoint says of its responses."""


def write_thinking_model(demo_model, folder):
    shutil.copytree(demo_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        if (tag := TAGS.get(token["id"])) is not None:
            vocabulary[tag] = vocabulary.pop(token["content"])
            token |= {"content": tag, "special": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    opening = re.compile(r"\{\{- '<\|im_start\|>assistant\\n' -\}\}")
    template, count = opening.subn(lambda _: OPENING, config["chat_template"])
    assert count == 1
    config |= {"chat_template": template, "response_template": RESPONSES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for token, word in LIKE.items():
        embedding[token] = embedding[vocabulary[word]]
    embedding[END_THINK] *= 1.02  # the head, too, so that it is a little likelier than the full stop
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
