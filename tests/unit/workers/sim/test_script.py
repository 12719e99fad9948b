import pytest

from planes.wire.errors import UNUSABLE_GRAMMAR, InvalidRequest
from planes.wire.frames import Sampling, StructuredOutput, pack_tokens
from workers.sim.script import script_of
from workers.sim.tokens import VOCAB_SIZE


def said(*, vocab_size=VOCAB_SIZE, **sampling):
    return script_of(Sampling(8, **sampling), vocab_size=vocab_size)


def test_an_answer_says_its_script_or_the_smallest_text_that_matches():
    assert said() is None
    assert said(script=pack_tokens([5, 6])) == (5, 6)
    assert said(script=pack_tokens([5]), structured=StructuredOutput(regex="a")) == (5,)
    assert bytes(said(structured=StructuredOutput(choice=["\u00e9s", "no"]))).decode() == "\u00e9s"
    schema = '{"type": "object", "properties": {"a": {"const": "\u00e9"}}, "required": ["a"]}'
    assert bytes(said(structured=StructuredOutput(json_schema=schema))).decode() == '{"a":"\u00e9"}'


@pytest.mark.parametrize("name", ["regex", "grammar", "structural_tag"])
def test_what_no_text_can_be_made_up_for_is_refused_by_name(name):
    with pytest.raises(InvalidRequest, match=f"no text for a {name}") as refused:
        said(structured=StructuredOutput(**{name: "{}"}))
    assert (refused.value.param, refused.value.code) == ("response_format", UNUSABLE_GRAMMAR)


def test_a_model_whose_tokens_are_no_bytes_says_no_json():
    with pytest.raises(InvalidRequest, match="has 9 tokens"):
        said(vocab_size=9, structured=StructuredOutput(choice=["a"]))
    assert said(vocab_size=9, script=pack_tokens([5])) == (5,)
