import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.answer.custom_input import CustomInput


def read(*pieces):
    reader = CustomInput()
    return "".join(map(reader.advance, pieces)) + reader.finish()


@given(st.text(), st.booleans(), st.data())
def test_the_input_comes_out_however_it_is_written_and_cut(text, is_ascii, data):
    written = json.dumps({"input": text}, ensure_ascii=is_ascii, indent=data.draw(st.sampled_from([None, 2])))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)))))
    pieces = [written[start:end] for start, end in zip([0, *cuts], [*cuts, len(written)], strict=True)]
    assert read(*pieces) == text


def test_as_much_as_is_there_comes_out_at_once():
    reader = CustomInput()
    assert [reader.advance(piece) for piece in ('{"inp', 'ut": "a', "b\\", "nc", '"}')] == ["", "a", "b", "\nc", ""]


@pytest.mark.parametrize("written", ["print(1)", '{"code": "x"}', '{"input": 5}', '"x"', "{", '{"in'])
def test_what_is_written_otherwise_is_handed_on_as_it_is(written):
    assert read(*written) == written


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r"a\ud83d\ude00b", "a\U0001f600b"),
        (r"a\ud83db", "a\ufffdb"),
        (r"a\ud83d", "a\ufffd"),
        (r"a\ud83d\nb", "a\ufffd\nb"),
        (r"a\ud83d\ud83d\ude00", "a\ufffd\U0001f600"),
        (r"a\ude00", "a\ufffd"),
        (r"a\uzzzz", r"a\uzzzz"),
    ],
)
def test_half_a_character_is_replaced(written, text):
    assert read('{"input": "', *written, '"}') == text
