import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from workers.answer.detokenizer import UnreadableTokenizer, load_vocabulary

SIM_TOKENIZER = Path("workers/sim/model/tokenizer.json")


def all_text(vocabulary, tokens, context=()):
    detokenizer = vocabulary.detokenizer(context)
    return "".join(detokenizer.advance(token) for token in tokens) + detokenizer.flush()


@given(text=st.text())
def test_byte_level_tokens_give_the_text_they_were_made_of(text):
    vocabulary = load_vocabulary(SIM_TOKENIZER)
    tokens = Tokenizer.from_file(str(SIM_TOKENIZER)).encode(text, add_special_tokens=False).ids
    assert all_text(vocabulary, tokens) == text


@given(tokens=st.lists(st.integers(0, 259)))
def test_any_byte_level_tokens_give_what_the_tokenizer_library_decodes(tokens):
    vocabulary = load_vocabulary(SIM_TOKENIZER)
    assert all_text(vocabulary, tokens) == Tokenizer.from_file(str(SIM_TOKENIZER)).decode(tokens)


def test_a_character_split_over_tokens_is_held_back():
    detokenizer = load_vocabulary(SIM_TOKENIZER).detokenizer(())
    assert [detokenizer.advance(byte) for byte in "☃".encode()] == ["", "", "☃"]


def test_an_unfinished_character_ends_as_a_replacement_character():
    detokenizer = load_vocabulary(SIM_TOKENIZER).detokenizer(())
    assert detokenizer.advance(0xE2) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_have_names_but_no_text():
    vocabulary = load_vocabulary(SIM_TOKENIZER)
    assert vocabulary.names[256] == b"<|end_of_text|>"
    assert vocabulary.texts[256] == b""


def test_ids_beyond_the_tokenizer_stand_for_nothing():
    assert all_text(load_vocabulary(SIM_TOKENIZER).covering(300), [72, 299, 105]) == "Hi"


def sentence_pieces(decoder, folder):
    words = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3, "<0xE2>": 4, "<0x98>": 5, "<0x83>": 6, "▁": 7}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoder
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizer, path


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def test_sentence_pieces_with_byte_fallback_become_text(tmp_path):
    tokenizer, path = sentence_pieces(LLAMA, tmp_path)
    vocabulary = load_vocabulary(path)
    assert vocabulary.fallback is None
    assert all_text(vocabulary, [1, 2, 3, 4, 5, 6]) == " " + tokenizer.decode([1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("decoder", [decoders.BPEDecoder(), decoders.WordPiece(), decoders.CTC()])
def test_other_decoders_go_through_the_tokenizer_library(decoder, tmp_path):
    tokenizer, path = sentence_pieces(decoder, tmp_path)
    vocabulary = load_vocabulary(path)
    assert vocabulary.fallback is not None
    tokens = [1, 2, 3, 3, 1, 2, 1, 3, 2, 1, 2, 3, 1, 1, 3, 2]
    assert all_text(vocabulary, tokens) == tokenizer.decode(tokens)


def test_a_word_after_the_prompt_keeps_its_space(tmp_path):
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.WordPiece()])
    tokenizer, path = sentence_pieces(decoder, tmp_path)
    vocabulary = load_vocabulary(path)
    assert vocabulary.fallback is not None
    assert tokenizer.decode([1]) + all_text(vocabulary, [2, 3], context=[1]) == tokenizer.decode([1, 2, 3])


def test_unigram_models_list_their_pieces(tmp_path):
    path = tmp_path / "tokenizer.json"
    spec = {
        "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁a", -1.0]]},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    }
    path.write_text(json.dumps(spec))
    assert all_text(load_vocabulary(path), [1, 1]) == " a a"


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"model":{}}'])
def test_a_missing_or_broken_tokenizer_is_named(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableTokenizer, match=r"tokenizer\.json"):
        load_vocabulary(path)
