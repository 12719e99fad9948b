"""The simulated model: which token follows a context.

    state of n tokens = advance(… advance(name of the last full block, token) …, last token)
    next token        = CHOICES[some bits of a hash of (key, state)]

A block's name (`wire/blocks.py`) stands for all tokens up to its end, so the state is a function of the whole context
and costs at most `block_size` steps to find, however long the context is. A lost, repeated or wrong token, or a block
of KV cache that is not what it should be, changes every token that follows.
"""

import hashlib
from collections.abc import Iterable, Sequence

from workers.engine.base import TokenLogprob

LETTERS = (32, *range(97, 123))
"""Token ids of the space and of a to z in the byte-level tokenizer (`workers/sim/model`)."""
EOS = 256
"""`<|end_of_text|>` there."""
VOCAB_SIZE = 260
"""The bytes, this one and three more."""
CHOICES = (*((letter,) for letter in LETTERS), *((LETTERS[0],) for _ in range(32 - len(LETTERS))))
"""Six spaces in 32 draws make words of four letters or so."""

_MASK = (1 << 64) - 1


def advance(state: int, token: int) -> int:
    """The state after one more token.

    CPython's hash of a tuple of integers is xxHash's rounds in C, the same in every process: nothing else mixes 64 bits
    in a tenth of a microsecond from Python. Signed.
    """
    return hash((state, token))


def advance_all(state: int, tokens: Iterable[int]) -> int:
    for token in tokens:
        state = hash((state, token))
    return state


def word_of(state: int) -> int:
    """The state as an unsigned 64-bit integer."""
    return state & _MASK


def draw(state: int, key: int) -> tuple[int, tuple[int]]:
    """64 bits that look random, a function of the two (signed), and the token id they mean, as a tuple of one."""
    bits = hash((key, state))
    return bits, CHOICES[(bits >> 33) & 31]


def is_end(bits: int, mean_tokens: int) -> bool:
    """Whether the model ends here by itself: once in `mean_tokens` draws. Uses other bits than the token does."""
    return (((bits >> 1) & 0xFFFFFFFF) * mean_tokens) >> 32 == 0


def key_of(*parts: object) -> int:
    """A key for `draw` from anything with a stable text: seed, choice index, model."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def logprob_of(token: int, bits: int, num_top: int) -> TokenLogprob:
    """Made-up log probabilities, the same for the same context: the token drawn leads, others follow at a distance."""
    logprob = -((bits >> 16 & 0xFFFF) + 1) / 65536
    others = (letter for letter in LETTERS if letter != token)
    ranked = [(token, logprob), *((letter, -2.0 - rank / 4) for rank, letter in enumerate(others))]
    return TokenLogprob(token, logprob, tuple(ranked[:num_top]), 1)


def prompt_logprobs_of(tokens: Sequence[int], num_top: int) -> tuple[TokenLogprob | None, ...]:
    """The same of a prompt's tokens; the first one follows nothing and has none."""
    state, logprobs = 0, list[TokenLogprob | None]()
    for token in tokens:
        logprobs.append(logprob_of(token, state, num_top) if logprobs else None)
        state = advance(state, token)
    return tuple(logprobs)
