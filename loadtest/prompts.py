"""Texts for the prompts of a workload, which has names of blocks and no words."""

import random

from loadtest.workloads import Turn

VOCABULARY = ["river", "water", "wheel", "mill", "stone", "weir", "gate", "flow", "race", "pond", "sluice", "turbine"]
"""One token each, or nearly, in most vocabularies."""


def text_of(turn: Turn, block_size: int, seed: int) -> str:
    """As many words as the prompt has tokens; two prompts begin alike as far as they share blocks.

    Args:  seed: of what is in no full block.
    """
    words: list[str] = []
    for name in turn.blocks[: turn.prompt_tokens // block_size].tolist():
        words += random.Random(name).choices(VOCABULARY, k=block_size)
    words += random.Random(seed).choices(VOCABULARY, k=turn.prompt_tokens - len(words))
    return " ".join(words)
