import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import structlog
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from app.prompt.template import ChatTemplate, Segment, SpecialToken
from app.prompt.tokenizer import Tokenizer, UnusableTokenizerError, _Fastokens, _HuggingFace

SIM = Path("workers/sim/model")
SIM_JSON = (SIM / "tokenizer.json").read_bytes()
SIM_CONFIG = json.loads((SIM / "tokenizer_config.json").read_text())
BOS, TURN, END = 257, 258, 259

BOS_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [8], "tokens": ["<s>"]}},
}


def description(**changes):
    """A little BPE vocabulary with one merge, a control token and a plain added token."""
    return {
        "version": "1.0",
        "added_tokens": [
            added(8, "<s>", special=True),
            added(9, "\n\n", special=False),
            added(10, "</s>", special=True),
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2, "<": 3, "s": 4, "\n": 5, ">": 6, "/": 7},
            "merges": [["a", "b"]],
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
        },
    } | changes


def added(token, content, *, special, rstrip=False):
    flags = {"single_word": False, "lstrip": False, "rstrip": rstrip, "normalized": False, "special": special}
    return {"id": token, "content": content, **flags}


def little(config=None, **changes):
    return Tokenizer(json.dumps(description(**changes)).encode(), config)


@pytest.fixture(scope="module")
def sim():
    return Tokenizer(SIM_JSON, SIM_CONFIG)


@pytest.fixture(scope="module")
def sim_template(sim):
    return ChatTemplate(SIM_CONFIG["chat_template"], sim.special_tokens, variables=sim.variables)


def test_the_shipped_tokenizer_loads_with_fastokens(sim):
    assert sim.backend == "fastokens"
    assert sim.vocab_size == 260
    assert sim.variables == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_turn|>"}
    assert SpecialToken("<|turn|>") in sim.special_tokens


@given(text=st.text(max_size=60))
def test_bytes_go_in_and_come_out(sim, text):
    tokens = sim.encode_prompt(text)
    assert tokens.dtype == np.uint32
    assert sim.decode(tokens) == text


def test_control_tokens_are_recognised_in_trusted_segments_only(sim):
    trusted = sim.encode_segments([Segment("<|turn|>", is_trusted=True)]).tolist()
    untrusted = sim.encode_segments([Segment("<|turn|>", is_trusted=False)]).tolist()
    assert trusted == [TURN]
    assert untrusted == list(b"<|turn|>")


def test_no_segments_are_no_tokens(sim):
    assert sim.encode_segments([]).tolist() == []


@given(
    content=st.text(max_size=30) | st.lists(st.sampled_from(["<|turn|>", "<|end_of_turn|>", "<|", "a"])).map("".join)
)
def test_a_chat_holds_the_templates_control_tokens_and_no_others(sim, sim_template, content):
    segments = sim_template.render([{"role": "user", "content": content}])
    tokens = sim.encode_segments(segments).tolist()
    assert [token for token in tokens if token > 255] == [BOS, TURN, END, TURN]
    assert sim.decode(np.array(tokens, dtype=np.uint32)) == "".join(segment.text for segment in segments)


def test_plain_added_tokens_match_in_untrusted_segments_too():
    assert little().encode_segments([Segment("a\n\n<s>", is_trusted=False)]).tolist() == [0, 9, 3, 4, 6]


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "\n\n"},
        {"additional_special_tokens": ["\n\n"]},
        {"added_tokens_decoder": {"9": {"content": "\n\n", "special": True}}},
    ],
)
def test_what_the_configuration_calls_special_is_a_control_token(config):
    tokenizer = little(config)
    assert SpecialToken("\n\n") in tokenizer.special_tokens
    assert tokenizer.encode_segments([Segment("\n\n", is_trusted=True)]).tolist() == [9]
    assert tokenizer.encode_segments([Segment("\n\n", is_trusted=False)]).tolist() == [5, 5]


def test_merges_reach_across_what_a_user_typed_as_if_the_text_were_encoded_whole():
    tokenizer = little()
    template = ChatTemplate("<s>a{{ messages[0].content }}</s>", tokenizer.special_tokens)
    tokens = tokenizer.encode_segments(template.render([{"role": "user", "content": "b<s>ab"}])).tolist()
    assert tokens == [8, 2, 3, 4, 6, 2, 10]


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        ({}, {}, [0]),
        ({}, {"post_processor": BOS_PROCESSOR}, [8, 0]),
        ({"bos_token": "<s>", "add_bos_token": True}, {}, [8, 0]),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, {}, [8, 0]),
        ({"bos_token": "<s>", "add_bos_token": True}, {"post_processor": BOS_PROCESSOR}, [8, 0]),
        ({"bos_token": "<s>", "add_bos_token": False}, {"post_processor": BOS_PROCESSOR}, [0]),
        ({"bos_token": "<s>"}, {}, [0]),
        ({"bos_token": None, "add_bos_token": True}, {}, [0]),
        ({"eos_token": "</s>", "add_eos_token": True}, {}, [0, 10]),
    ],
)
def test_a_raw_prompt_gets_what_the_configuration_puts_around_it(config, changes, expected):
    assert little(config, **changes).encode_prompt("a").tolist() == expected


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    tokenizer = little({"bos_token": "<s>", "add_bos_token": True})
    assert tokenizer.encode_prompt("<s>a").tolist() == [8, 0]


def test_a_rendered_chat_gets_nothing_added():
    tokenizer = little({"bos_token": "<s>", "add_bos_token": True}, post_processor=BOS_PROCESSOR)
    assert tokenizer.encode_segments([Segment("a", is_trusted=True)]).tolist() == [0]


def word_level():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1, "b": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer.to_str().encode()


def test_a_model_that_fastokens_lacks_falls_back_and_says_so():
    with structlog.testing.capture_logs() as logs:
        tokenizer = Tokenizer(word_level())
    assert tokenizer.backend == "tokenizers"
    assert [(log["event"], log["log_level"]) for log in logs] == [("tokenizer.fallback", "warning")]
    assert "WhitespaceSplit" in logs[0]["reason"]
    assert tokenizer.encode_prompt("a b <s>").tolist() == [0, 2, 3]
    assert tokenizer.encode_segments([Segment("a <s>", is_trusted=False)]).tolist() == [0, 1]
    assert tokenizer.decode(np.array([0, 2], dtype=np.uint32)) == "a b"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "BPE"}}', b'{"model": {"vocab": 3}}']
)
def test_a_file_that_is_no_tokenizer_is_refused(content):
    with pytest.raises(UnusableTokenizerError):
        Tokenizer(content)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, 4),
        ({"normalizer": {"type": "NFC"}}, 16),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, 4),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "ab"}, "content": "a"}}, None),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, None),
        ({"added_tokens": [added(8, "<s>", special=True, rstrip=True)]}, None),
    ],
)
def test_characters_per_token_are_bounded_only_where_that_is_certain(changes, bound):
    assert little(**changes).max_chars_per_token == bound


def test_threads_share_one_tokenizer(sim):
    texts = [f"{index} " * 2000 for index in range(8)]
    with ThreadPoolExecutor(4) as threads:
        encoded = list(threads.map(sim.encode_prompt, texts))
    assert [sim.decode(tokens) for tokens in encoded] == texts


def test_the_cache_changes_no_tokens():
    plain, cached = Tokenizer(SIM_JSON, cache_bytes=0), Tokenizer(SIM_JSON, cache_bytes=1 << 16)
    for _ in range(3):
        text = "<|turn|>user\nhello<|end_of_turn|>" * 50
        assert np.array_equal(plain.encode_prompt(text), cached.encode_prompt(text))


def test_the_cache_keeps_to_its_bound():
    bound = 1 << 20
    backend = _Fastokens(SIM_JSON.decode(), bound)
    for number in range(6000):
        backend.encode(f"<|turn|>user\n{number} {'hello ' * 10}<|end_of_turn|>", is_trusted=True)
    stats = backend._tokenizer.segment_cache_stats()
    assert stats is not None
    assert stats["misses"] >= 6000
    assert bound / 4 < stats["bytes"] <= bound
    assert stats["entries"] < 6000


def test_tokens_are_spelt_as_the_vocabulary_writes_them(sim):
    tokens = np.array([*b"a \xc3", 256, 5000], dtype=np.uint32)
    assert sim.spellings(tokens) == ["a", "\u0120", "\u00c3", "<|end_of_text|>", ""]
    other = _HuggingFace(SIM_JSON.decode())
    assert [other.spelling(token) for token in tokens.tolist()] == ["a", "\u0120", "\u00c3", "<|end_of_text|>", None]
