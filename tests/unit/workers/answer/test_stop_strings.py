import sys
from itertools import accumulate

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


class PlainFinder:
    """What a StopFinder does, looked up anew in the whole text of each piece."""

    def __init__(self, stops, *, is_kept):
        self.stops, self.is_kept = stops, is_kept
        self.held = self.found = ""

    def advance(self, text):
        held = self.held + text
        ends = [(held.find(stop), stop) for stop in self.stops if stop in held]
        if ends:
            start, self.found = min(ends)
            self.held = ""
            return held[: start + len(self.found) * self.is_kept]
        begun = [end for end in accumulate(reversed(held), lambda end, char: char + end) if self.begins(end)]
        self.held = max(begun, key=len, default="")
        return held.removesuffix(self.held)

    def begins(self, end):
        return any(stop.startswith(end) for stop in self.stops)

    def flush(self):
        held, self.held = self.held, ""
        return held


@given(
    pieces=st.lists(st.text("abc", max_size=6), max_size=12),
    stops=st.lists(
        st.text("ab", min_size=1, max_size=7) | st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4
    ),
    is_kept=st.booleans(),
    after_flush=st.text("ab", max_size=4),
)
def test_each_piece_lets_go_what_a_search_through_all_that_is_held_would(pieces, stops, is_kept, after_flush):
    finder, plain = StopFinder(stops, is_kept=is_kept), PlainFinder(stops, is_kept=is_kept)
    for piece in pieces:
        assert finder.advance(piece) == plain.advance(piece)
        assert finder.found == plain.found
        if finder.found:
            return
    assert finder.flush() == plain.flush()
    assert finder.advance(after_flush) == plain.advance(after_flush)


def test_a_token_costs_no_more_when_much_is_held():
    others = [f"{letter}{'a' * 1023}" for letter in "bcdefghijklmnop"]
    finder = StopFinder(["a" * 1024, *others])
    steps = [num_lines(finder.advance, "a") for _ in range(1000)]
    assert max(steps[1:]) == steps[1]


def num_lines(function, text):
    """How many lines of its module a call runs."""
    num = 0

    def count(frame, event, _arg):
        nonlocal num
        num += event == "line" and frame.f_globals["__name__"] == function.__module__
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        function(text)
    finally:
        sys.settrace(before)
    return num
