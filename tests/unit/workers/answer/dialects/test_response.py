import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.frames import FinishReason, Format, Parsing, Sampling, Usage
from planes.wire.response_object import response_of
from tests.openai_types import checked_event, checked_response, sse
from workers.answer.detokenizer import load_vocabulary
from workers.answer.dialects.base import Ending, FinishedChoice
from workers.answer.dialects.response import ResponseDialect
from workers.answer.formatter import Formatter
from workers.answer.parts import CallArguments, CallStart, Content, Reasoning, merged
from workers.engine.base import EngineOutput, TokenLogprob

VOCABULARY = load_vocabulary(Path("workers/sim/model/tokenizer.json"))
END = 259
USAGE = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=4, reasoning_tokens=1)
REPEATED = {
    "instructions": "Be brief.",
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
    "top_p": 1.0,
    "store": True,
}


class Switches:
    """A parser: R, T, F and C begin thoughts, text, a function call, a custom call; the rest is what there is."""

    reasoning_tokens = 0

    def __init__(self):
        self.kind, self.num_calls = "T", 0

    def advance(self, text, token):
        del token
        return [part for char in text for part in self._char(char)]

    def finish(self, text):
        return self.advance(text, 0)

    def _char(self, char):
        if char in "RTFC":
            self.kind = char
            if char in "FC":
                self.num_calls += 1
                return [CallStart(self.num_calls - 1, {"F": "f", "C": "custom"}[char])]
            return []
        match self.kind:
            case "T":
                return [Content(char)]
            case "R":
                return [Reasoning(char)]
            case _:
                return [CallArguments(self.num_calls - 1, char)]


def formatter(*, is_streaming=True, is_parsed=True, sampling=None):
    layout = Format(
        kind="response",
        response_id="resp_0123456789abcdef01234567",
        model="sim",
        created=7,
        is_streaming=is_streaming,
        parsing=Parsing(custom=["custom"]) if is_parsed else None,
        repeated=msgspec.json.encode(REPEATED),
    )
    return Formatter(
        layout,
        sampling or Sampling(max_tokens=99),
        VOCABULARY,
        end_tokens=frozenset({END}),
        parser=Switches if is_parsed else None,
    )


def step(tokens, finish=None, *, logprobs=False):
    notes = tuple(TokenLogprob(token, -0.5, ((token, -0.5), (65, -2.0))) for token in tokens) if logprobs else ()
    return EngineOutput(0, tuple(tokens), notes, finish)


def run(form, outputs):
    return b"".join([form.feed(output)[0] for output in outputs] + [form.finish(USAGE)])


def streamed(text, finish=FinishReason.STOP, **how):
    outputs = [step([token]) for token in text.encode()]
    outputs.append(step([END] if finish is FinishReason.STOP else [], finish))
    return sse(run(formatter(**how), outputs))


def whole(text, finish=FinishReason.STOP, **how):
    form = formatter(is_streaming=False, **how)
    form.feed(step(text.encode()))
    form.feed(step([END] if finish is FinishReason.STOP else [], finish))
    return json.loads(form.finish(USAGE))


def kinds(events):
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_is_told_in_openais_order():
    events = streamed("Hi", is_parsed=False)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(10))
    assert events[0]["response"]["status"] == "in_progress"
    assert events[-1]["response"]["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 7,
    }


def test_what_the_request_said_is_repeated():
    for event in (streamed("Hi")[0], streamed("Hi")[-1]):
        assert event["response"].items() >= REPEATED.items()


def test_thoughts_calls_and_text_are_items_of_their_own():
    events = streamed('RhmF{"x":1}C{"input": "a\\nb"}Tdone')
    items = events[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["reasoning", "function_call", "custom_tool_call", "message"]
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (items[1]["name"], items[1]["arguments"]) == ("f", '{"x":1}')
    assert (items[2]["name"], items[2]["input"]) == ("custom", "a\nb")
    assert items[3]["content"][0]["text"] == "done"
    assert [kind for kind in dict.fromkeys(kinds(events)) if "arguments" in kind or "input" in kind] == [
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
    ]


def test_a_response_that_is_cut_off_is_incomplete_and_so_is_its_last_item():
    events = streamed('TaF{"x":', FinishReason.LENGTH)
    response = events[-1]["response"]
    assert kinds(events)[-1] == "incomplete"
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize("text", ["", " \n", "R", "T"])
def test_an_answer_without_words_is_one_message(text):
    (item,) = streamed(text)[-1]["response"]["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", text.strip("RT"))


def test_blanks_between_items_are_nobodys_and_those_before_text_are_the_texts():
    items = streamed("RhmT\n\nF{}T\nRxT\n yes")[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["reasoning", "function_call", "reasoning", "message"]
    assert items[3]["content"][0]["text"] == "\n yes"


def test_an_id_says_which_response_it_is_of():
    for item in streamed("RhmTaF{}")[-1]["response"]["output"]:
        assert response_of(item["id"]) == "resp_0123456789abcdef01234567"


def test_log_probabilities_leave_with_the_text_and_are_all_told_in_the_end():
    sampling = Sampling(max_tokens=99, logprobs=2, stop=["!?"])
    form = formatter(is_parsed=False, sampling=sampling)
    events = sse(run(form, [step(b"H!", logprobs=True), step(b"i", logprobs=True), step([], FinishReason.LENGTH)]))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [(event["delta"], [each["token"] for each in event["logprobs"]]) for event in deltas] == [
        ("H", ["H"]),
        ("!i", ["!", "i"]),
    ]
    part = events[-1]["response"]["output"][0]["content"][0]
    assert [each["token"] for each in part["logprobs"]] == ["H", "!", "i"]
    assert part["logprobs"][0]["top_logprobs"][1] == {"token": "A", "logprob": -2.0, "bytes": [65]}
    form = formatter(is_streaming=False, is_parsed=False, sampling=sampling)
    form.feed(step(b"H!i", FinishReason.LENGTH, logprobs=True))
    assert json.loads(form.finish(USAGE))["output"][0]["content"][0] == part
    for event in events:
        checked_event(event)


AMID_OTHERS = [
    [CallStart(0, "f"), CallStart(1, "custom"), CallArguments(0, '{"a":1}'), CallArguments(1, '{"input":"b"}')],
    [CallStart(0, "f"), CallStart(1, "custom"), CallArguments(1, '{"input":"b"}'), CallArguments(0, '{"a":1}')],
    [
        CallStart(0, "f"),
        Content(" \n"),
        CallArguments(0, '{"a"'),
        CallStart(1, "custom"),
        CallArguments(1, '{"input"'),
        CallArguments(0, ":1}"),
        CallArguments(1, ':"b"}'),
    ],
]


@pytest.mark.parametrize("parts", AMID_OTHERS)
def test_arguments_that_come_amid_others_are_their_own_call_s(parts):
    ending = Ending(FinishReason.STOP, has_calls=True)
    stream = dialect()
    pieces = [stream.opening(0), *(stream.part(0, part) for part in parts), stream.closing(0, ending)]
    events = sse(b"".join(pieces) + stream.last(USAGE))
    for event in events:
        checked_event(event)
    response = events[-1]["response"]
    assert [item.get("arguments", item.get("input")) for item in response["output"]] == ['{"a":1}', "b"]
    assert json.loads(dialect().body([FinishedChoice(0, merged(parts), None, ending)], USAGE)) == response
    for place in (0, 1):
        deltas = [event["delta"] for event in events if "delta" in event and event["output_index"] == place]
        assert "".join(deltas) == ['{"a":1}', "b"][place]


def dialect():
    layout = Format(
        kind="response",
        response_id="resp_0123456789abcdef01234567",
        model="sim",
        created=7,
        parsing=Parsing(custom=["custom"]),
        repeated=msgspec.json.encode(REPEATED),
    )
    return ResponseDialect(layout, VOCABULARY)


TEXTS = st.text(alphabet='RTFC ab\n{}:"\\u0inpt,', max_size=40)


@given(TEXTS, st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
def test_every_event_is_of_openais_types_and_they_agree_with_the_whole(text, finish):
    events = streamed(text, finish)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        checked_event(event)
    response = events[-1]["response"]
    assert whole(text, finish) == response
    checked_response(response)
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == response["output"]
    assert [item["id"] for item in added] == [item["id"] for item in done]
    assert len({item["id"] for item in added}) == len(added)
    for place, item in enumerate(done):
        deltas = "".join(event["delta"] for event in events if "delta" in event and event["output_index"] == place)
        content = item["content"][0]["text"] if "content" in item else None
        assert deltas == (item.get("arguments", item.get("input")) if content is None else content)
        ids = {event["item_id"] for event in events if event.get("output_index") == place and "item_id" in event}
        assert ids == {item["id"]}


@given(TEXTS, st.data())
def test_resumed_at_any_token_the_bytes_go_on_as_if_uninterrupted(text, data):
    tokens = list(text.encode())
    num_resumed = data.draw(st.integers(0, len(tokens)))
    form = formatter()
    before = b"".join(form.feed(step([token]))[0] for token in tokens[:num_resumed])
    rest = [*(step([token]) for token in tokens[num_resumed:]), step([END], FinishReason.STOP)]
    uninterrupted = run(form, rest)
    resumed = formatter()
    resumed.fold(tokens[:num_resumed])
    assert run(resumed, rest) == uninterrupted
    if num_resumed:
        assert before.startswith(b"event: response.created\n")
