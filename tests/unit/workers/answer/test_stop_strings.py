from hypothesis import given
from hypothesis import strategies as st

from workers.answer.stop_strings import StopFinder

LETTERS = st.text("ab", max_size=4)


def test_text_that_could_begin_a_stop_string_is_held_back():
    finder = StopFinder(["END"])
    assert finder.advance("the E") == "the "
    assert finder.advance("N") == ""
    assert finder.advance("T") == "ENT"
    assert not finder.found


def test_text_after_the_first_stop_string_is_cut():
    finder = StopFinder(["late", "stop"])
    assert finder.advance("go stop late") == "go "
    assert finder.found


def test_held_text_leaves_at_the_end():
    finder = StopFinder(["\n\n"])
    assert finder.advance("line\n") == "line"
    assert finder.flush() == "\n"
    assert finder.flush() == ""


@given(pieces=st.lists(LETTERS), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_any_split_of_a_text_is_cut_where_its_first_complete_stop_string_begins(pieces, stops):
    finder, left = StopFinder(stops), ""
    for piece in pieces:
        left += finder.advance(piece)
        if finder.found:
            break
    else:
        left += finder.flush()
    text = "".join(pieces)
    assert text.startswith(left)
    assert bool(finder.found) == any(stop in text for stop in stops)
    assert not any(stop in left for stop in stops)
    if finder.found:
        assert any(text.startswith(stop, len(left)) for stop in stops)
    else:
        assert left == text


@given(text=st.text("ab"), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_less_than_the_longest_stop_string_is_held(text, stops):
    finder = StopFinder(stops)
    left = finder.advance(text)
    if not finder.found:
        assert len(text) - len(left) < max(map(len, stops))
