"""Texts for prompts: of workloads, which have names of blocks and no words, and of the benches."""

import itertools
import random
from typing import Final

from loadtest.workloads import Turn

VOCABULARY = ["river", "water", "wheel", "mill", "stone", "weir", "gate", "flow", "race", "pond", "sluice", "turbine"]
"""One token each, or nearly, in most vocabularies."""

_NUM_WORDS: Final = 5000


def _made_up(rng: random.Random) -> str:
    """A word of one to four syllables."""
    return "".join(rng.choice("bcdfghlmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))


_WORDS: Final = list(map(_made_up, [random.Random(0)] * _NUM_WORDS))
_WEIGHTS: Final = list(itertools.accumulate(1 / rank for rank in range(1, _NUM_WORDS + 1)))
"""Zipf's law, as in what people write: tokenizers remember words, and letters drawn at random repeat none."""


def prose(rng: random.Random, length: int) -> str:
    """So many characters of made-up words, some of which are frequent."""
    return " ".join(rng.choices(_WORDS, cum_weights=_WEIGHTS, k=length // 3 + 1))[:length]


def text_of(turn: Turn, block_size: int, seed: int) -> str:
    """As many words as the prompt has tokens; two prompts begin alike as far as they share blocks.

    Args:  seed: of what is in no full block.
    """
    words: list[str] = []
    for name in turn.blocks[: turn.prompt_tokens // block_size].tolist():
        words += random.Random(name).choices(VOCABULARY, k=block_size)
    words += random.Random(seed).choices(VOCABULARY, k=turn.prompt_tokens - len(words))
    return " ".join(words)
