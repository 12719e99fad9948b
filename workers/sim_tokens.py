"""The simulated model: which token follows a context.

    state of n tokens = advance(… advance(name of the last full block, token) …, last token)
    next token        = letter(draw(state, key))

A block's name (`planes/blocks.py`) stands for all tokens up to its end, so the state is a function of the whole context
and costs at most `block_size` steps to find, however long the context is. A lost, repeated or wrong token, or a block
of KV cache that is not what it should be, changes every token that follows.
"""

import hashlib
from collections.abc import Iterable

from workers.engine import TokenLogprob

MASK = (1 << 64) - 1
LETTERS = (32, *range(97, 123))
"""Token ids of the space and of a to z in the byte-level tokenizer (`workers/sim_model`)."""
EOS = 256
"""`<|end_of_text|>` there."""
CHOICES = tuple((letter,) for letter in LETTERS)

_NUM_LETTERS = len(LETTERS)
_STEP, _OFFSET = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def advance(state: int, token: int) -> int:
    """The state after one more token. A bijection of `state`, so nothing of the past is forgotten."""
    return (((state ^ token) * _STEP) + _OFFSET) & MASK


def advance_all(state: int, tokens: Iterable[int]) -> int:
    for token in tokens:
        state = (((state ^ token) * _STEP) + _OFFSET) & MASK
    return state


def draw(state: int, key: int) -> int:
    """64 bits that look random, a function of the two."""
    bits = ((state ^ key) * _FIRST) & MASK
    return ((bits ^ (bits >> 29)) * _SECOND) & MASK


def choice(bits: int) -> tuple[int]:
    """The token id that a draw means, as a tuple of one."""
    return CHOICES[(bits >> 32) * _NUM_LETTERS >> 32]


def is_end(bits: int, mean_tokens: int) -> bool:
    """Whether the model ends here by itself: once in `mean_tokens` draws. Uses other bits than `choice` does."""
    return ((bits & 0xFFFFFFFF) * mean_tokens) >> 32 == 0


def key_of(*parts: object) -> int:
    """A key for `draw` from anything with a stable text: seed, choice index, model."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def logprob_of(token: int, bits: int, num_top: int) -> TokenLogprob:
    """Made-up log probabilities, the same for the same context: the token drawn leads, others follow at a distance."""
    logprob = -((bits >> 16 & 0xFFFF) + 1) / 65536
    others = (letter for letter in LETTERS if letter != token)
    ranked = [(token, logprob), *((letter, -2.0 - rank / 4) for rank, letter in enumerate(others))]
    return TokenLogprob(token, logprob, tuple(ranked[:num_top]))
