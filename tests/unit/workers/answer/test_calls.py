from hypothesis import given
from hypothesis import strategies as st

from workers.answer.calls import Turns
from workers.answer.parts import CallArguments, CallStart, Content, Part, Reasoning, merged


def in_turn(parts):
    turns = Turns()
    told = [each for part in parts for each in turns.advance(part)]
    return [*told, *turns.finish()]


def test_what_comes_in_turn_is_told_at_once():
    turns = Turns()
    call = [CallStart(0, "f"), CallArguments(0, "{"), CallArguments(0, "}")]
    others = [CallStart(1, "g"), CallArguments(1, "null"), CallStart(2, "h"), CallArguments(2, "{}")]
    for part in [Content("a"), *call, Reasoning("b"), Content("c"), *others]:
        assert turns.advance(part) == [part]


def test_what_comes_amid_arguments_waits_until_they_are_whole_and_more_comes():
    turns = Turns()
    turns.advance(CallStart(0, "f"))
    assert turns.advance(Content("a")) == []
    assert turns.advance(CallArguments(0, '{"}')) == [CallArguments(0, '{"}')]
    assert turns.advance(Content("b")) == []
    assert turns.advance(CallArguments(0, '"}')) == [CallArguments(0, '"}')]
    assert turns.advance(Content("c")) == [Content("a"), Content("b"), Content("c")]


def test_what_waits_is_told_in_the_end():
    assert in_turn([CallStart(0, "f"), Content("a"), CallArguments(0, "{")]) == [
        CallStart(0, "f"),
        CallArguments(0, "{"),
        Content("a"),
    ]


def test_arguments_behind_whole_ones_are_left_out_once_something_else_was_told():
    parts = [CallStart(0, "f"), CallArguments(0, "{}"), Content("a"), CallArguments(0, " "), Content("b")]
    assert in_turn(parts) == [CallStart(0, "f"), CallArguments(0, "{}"), Content("a"), Content("b")]


ARGUMENTS = st.sampled_from(["", "{}", '{"a": "}{"}', "[1, {}]", "null", '{"cut": ', "}{", ' {"a":1} {'])


@st.composite
def shuffles(draw):
    """Calls, the pieces of their arguments and texts in any order in which each call and each piece may come."""
    texts: list[Part] = [Content(text) for text in draw(st.lists(st.sampled_from("ab")))]
    arguments = draw(st.lists(ARGUMENTS, max_size=3))
    queues = [texts, *([CallArguments(call, char) for char in text] for call, text in enumerate(arguments))]
    parts, calls = [], iter(range(len(arguments)))
    open_queues = [queues[0]]
    while any(open_queues) or len(open_queues) < len(queues):
        choices = [queue for queue in open_queues if queue]
        if len(open_queues) < len(queues) and (not choices or draw(st.booleans())):
            call = next(calls)
            parts.append(CallStart(call, "f"))
            open_queues.append(queues[call + 1])
        else:
            parts.append(draw(st.sampled_from(choices)).pop(0))
    return parts


@given(shuffles())
def test_each_call_is_told_in_one_and_it_does_not_matter_how_its_text_came(parts):
    told = merged(in_turn(parts))
    assert told == merged(in_turn(merged(parts)))
    for before, part in zip([None, *told], told, strict=False):
        if isinstance(part, CallArguments):
            assert isinstance(before, CallStart)
            assert before.index == part.index
    starts = [part.index for part in told if isinstance(part, CallStart)]
    assert starts == sorted(starts)
    for kind in (Content, CallStart):
        assert [p for p in in_turn(parts) if isinstance(p, kind)] == [p for p in parts if isinstance(p, kind)]
    for call in starts:
        said = "".join(p.text for p in parts if isinstance(p, CallArguments) and p.index == call)
        heard = "".join(p.text for p in told if isinstance(p, CallArguments) and p.index == call)
        assert heard == said or (said.startswith(heard) and heard.strip())
        if said in ("{}", '{"a": "}{"}', "[1, {}]", '{"cut": '):
            assert heard == said
