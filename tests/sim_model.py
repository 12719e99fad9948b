"""The simulated engine's model, as a gateway has it when a worker has published its card."""

import json
from pathlib import Path

from app.prompt.prepare import ModelEntry
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer

SIM = Path("workers/sim/model")
CONFIG = json.loads((SIM / "tokenizer_config.json").read_text())


def sim_model(*, context_length, digest=""):
    tokenizer = Tokenizer((SIM / "tokenizer.json").read_bytes(), CONFIG)
    template = ChatTemplate(CONFIG["chat_template"], tokenizer.special_tokens, variables=tokenizer.variables)
    return ModelEntry("sim", tokenizer, template, context_length, 16, tokenizer.vocab_size, digest=digest)
