import json

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from workers.demo_model.tokenizer import tokenizer_json

NORMAL, CONTROL = 1, 3
BYTES = sorted(ByteLevel.alphabet())
MERGES = ["h e", "Ġ t", "Ġt he", "Ġ 1", "1 2", "Ġ Ġ"]
TOKENS = ["<|end|>", *BYTES, *(merge.replace(" ", "") for merge in MERGES)]


@pytest.fixture(scope="module")
def tokenizer():
    kinds = [CONTROL, *[NORMAL] * (len(TOKENS) - 1)]
    return Tokenizer.from_str(json.dumps(tokenizer_json(TOKENS, kinds, MERGES)))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("he the", ["he", "Ġthe"]),
        ("12 12", ["1", "2", "Ġ", "1", "2"]),
        ("he   he", ["he", "ĠĠ", "Ġ", "he"]),
        ("the<|end|>he", ["t", "he", "<|end|>", "he"]),
        ("²½", ["Â", "²", "Â", "½"]),
    ],
)
def test_digits_stand_alone_and_control_tokens_are_found(tokenizer, text, tokens):
    assert tokenizer.encode(text).tokens == tokens


@pytest.mark.parametrize("text", ["", " the\n\t ", "日本語 🙂 é", "\x00\ufeff 1²"])
def test_what_is_encoded_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
