"""Every dialect is a fold over tokens: whoever goes on after any of them writes what was still to be written.

The texts are made of what is hard to cut: tags and halves of tags, calls and their escapes, characters of several
bytes, stop strings and their beginnings. A token is a byte, so that every cut is tried.
"""

import itertools
import json
from pathlib import Path

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from planes.wire.frames import FinishReason, Format, Parsing, Sampling, Usage
from workers.answer.detokenizer import load_vocabulary
from workers.answer.formatter import Formatter
from workers.answer.markup import MarkupParser
from workers.engine.base import EngineOutput

VOCABULARY = load_vocabulary(Path("workers/sim/model/tokenizer.json"))
END = 259
PROMPT = np.arange(65, 75, dtype=np.uint32)
USAGE = Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=4)
STOP = "END é"

FUNCTION = '<tool_call>\n{"name": "f", "arguments": {"a": "é☃ \\"\\u00e9}"}}\n</tool_call>'
CUSTOM = '<tool_call>{"name": "shell", "arguments": {"input": "ls \\"é\\n\\ud83d\\ude00"}}</tool_call>'
STORY = f"<think>hm ☃…</think>\n\nI look. {FUNCTION}\n{CUSTOM} done EN"

WORDS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    FUNCTION,
    CUSTOM,
    '{"name": "f", "arguments": {"x": [1, "}"',
    '[{"name": "f", "parameters": {"x": 1}}, {"name": "shell", "parameters": {"input": "ls"}}]',
    "<tool_",
    "END",
    STOP,
    "☃",
    "😀",
    "é",
    " ",
    "\n\n",
    '"',
    "}",
    "word",
]


@st.composite
def stories(draw, kinds=("chat", "completion", "message", "response"), n=1):
    """A request, and for each of its choices the tokens and how they end."""
    kind = draw(st.sampled_from(kinds))
    is_openais = kind in ("chat", "completion")
    parsing = Parsing(
        tools=b"[{}]",
        tool_choice=draw(st.sampled_from(["auto", "auto", "none", "required", "function:f", "function:shell"])),
        is_parallel=draw(st.booleans()),
        custom=["shell"],
        has_reasoning=draw(st.booleans()),
    )
    layout = Format(
        kind=kind,
        response_id="resp_0123456789abcdef01234567",
        model="m",
        created=7,
        include_usage=is_openais,
        parsing=None if kind == "completion" else parsing,
        has_token_ids=is_openais and draw(st.booleans()),
        has_continuous_usage=is_openais and draw(st.booleans()),
    )
    sampling = Sampling(
        max_tokens=999, n=n, stop=draw(st.sampled_from([[], [STOP]])), is_stop_included=draw(st.booleans())
    )
    choices = []
    for _ in range(n):
        tokens = list("".join(draw(st.lists(st.sampled_from(WORDS), max_size=8))).encode())
        tokens = tokens[: len(tokens) - draw(st.integers(0, 3))]
        finish = draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
        choices.append(([*tokens, END] if finish is FinishReason.STOP else tokens or [97], finish))
    return layout, sampling, choices


def formatter(layout, sampling, *, is_streaming=True):
    fields = {name: getattr(layout, name) for name in layout.__struct_fields__} | {"is_streaming": is_streaming}
    parsing = layout.parsing
    return Formatter(
        Format(**fields),
        sampling,
        VOCABULARY,
        end_tokens=frozenset({END}),
        prompt=PROMPT,
        parser=None if parsing is None else lambda: MarkupParser(parsing),
    )


def outputs(tokens, finish, index=0):
    """The tokens one by one."""
    last = len(tokens) - 1
    return [EngineOutput(index, (token,), finish=finish if at == last else None) for at, token in enumerate(tokens)]


def resumed(form, tokens, finish, after):
    """What a worker writes that goes on after so many tokens."""
    form.fold(tokens[:after], is_stopped=after == len(tokens) and finish is FinishReason.STOP)
    if after == len(tokens) or form.finish_reason is not None:
        return form.end(finish) + form.finish(USAGE)
    return b"".join([form.feed(output)[0] for output in outputs(tokens, finish)[after:]]) + form.finish(USAGE)


def told_whole(kind, parsing):
    layout = Format(kind, "resp_0123456789abcdef01234567", "m", 7, parsing=parsing, has_token_ids=kind == "chat")
    return layout, Sampling(max_tokens=999, stop=[STOP]), [([*STORY.encode(), END], FinishReason.STOP)]


WHOLE = Parsing(tools=b"[{}]", custom=["shell"], has_reasoning=True)


@example(told_whole("chat", WHOLE))
@example(told_whole("message", WHOLE))
@example(told_whole("response", WHOLE))
@example(told_whole("completion", None))
@given(stories())
def test_resumed_after_any_token_the_rest_is_what_it_would_have_been(story):
    layout, sampling, [(tokens, finish)] = story
    undisturbed = formatter(layout, sampling)
    written = [undisturbed.feed(output)[0] for output in outputs(tokens, finish)]
    last = undisturbed.finish(USAGE)
    num_counted = undisturbed.completion_tokens
    for after in range(1, num_counted + 1):
        form = formatter(layout, sampling)
        rest = resumed(form, tokens, finish, after)
        assert form.completion_tokens == num_counted
        expected = b"".join(written[after:]) + last
        if after < num_counted:
            assert rest == expected
        else:  # everything but the ending is told already; it is told again, by whoever was not heard to the end
            assert rest.endswith(expected)
            assert (b"".join(written) + last).endswith(rest)


@example(told_whole("chat", WHOLE))
@given(stories())
def test_resumed_after_any_token_a_whole_answer_is_the_same(story):
    layout, sampling, [(tokens, finish)] = story
    undisturbed = formatter(layout, sampling, is_streaming=False)
    for output in outputs(tokens, finish):
        assert undisturbed.feed(output)[0] == b""
    body = undisturbed.finish(USAGE)
    for after in range(1, undisturbed.completion_tokens + 1):
        assert resumed(formatter(layout, sampling, is_streaming=False), tokens, finish, after) == body


@given(stories(), st.lists(st.integers(1, 200)))
def test_it_does_not_matter_how_many_tokens_a_step_has(story, cuts):
    layout, sampling, [(tokens, finish)] = story
    one_by_one, in_steps = formatter(layout, sampling), formatter(layout, sampling)
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    steps = [
        EngineOutput(0, tuple(tokens[start:end]), finish=finish if end == len(tokens) else None)
        for start, end in itertools.pairwise(edges)
    ]
    written = [b"".join([form.feed(step)[0] for step in each]) + form.finish(USAGE)
               for form, each in ((one_by_one, outputs(tokens, finish)), (in_steps, steps))]  # fmt: skip
    assert written[0] == written[1]


@given(stories(("chat", "completion"), n=2), st.data())
def test_choices_say_the_same_however_they_take_turns(story, data):
    layout, sampling, choices = story
    queues = [outputs(tokens, finish, index) for index, (tokens, finish) in enumerate(choices)]
    form = formatter(layout, sampling)
    written = b""
    while any(queues):
        index = data.draw(st.sampled_from([at for at, queue in enumerate(queues) if queue]))
        written += form.feed(queues[index].pop(0))[0]
    for index, (tokens, finish) in enumerate(choices):
        alone = formatter(layout, sampling)
        expected = b"".join([alone.feed(output)[0] for output in outputs(tokens, finish, index)])
        assert [event for event in events(written) if event["choices"][0]["index"] == index] == events(expected)


def events(written):
    lines = [line for line in written.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def called(call):
    fields = call.get("function") or call.get("custom") or {}
    return call.get("id"), fields.get("name"), fields.get("arguments", fields.get("input", ""))


def of_chat(streamed, body):
    """Text, thoughts, calls and ending, in the stream and in the whole."""
    deltas = [choice for event in streamed for choice in event["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in deltas)
    thoughts = "".join(choice["delta"].get("reasoning", "") for choice in deltas)
    assert thoughts == "".join(choice["delta"].get("reasoning_content", "") for choice in deltas)
    calls = []
    for choice in deltas:
        for call in choice["delta"].get("tool_calls", ()):
            identifier, name, more = called(call)
            if identifier:
                assert call["index"] == len(calls)
                calls.append((identifier, name, more))
            else:
                calls[call["index"]] = (*calls[call["index"]][:2], calls[call["index"]][2] + more)
    tokens = [token for choice in deltas for token in choice.get("token_ids", ())]
    (choice,) = body["choices"]
    message = choice["message"]
    assert message.get("reasoning_content", "") == message.get("reasoning", "")
    ending = deltas[-1]["finish_reason"]
    return (text, thoughts, calls, ending, tokens), (
        message["content"] or "",
        message.get("reasoning", ""),
        [called(call) for call in message.get("tool_calls", ())],
        choice["finish_reason"],
        choice.get("token_ids", []),
    )


def of_completion(streamed, body):
    choices = [choice for event in streamed for choice in event["choices"]]
    tokens = [token for choice in choices for token in choice.get("token_ids", ())]
    (whole,) = body["choices"]
    return ("".join(choice["text"] for choice in choices), choices[-1]["finish_reason"], tokens), (
        whole["text"],
        whole["finish_reason"],
        whole.get("token_ids", []),
    )


def of_message(streamed, body):
    blocks, ending = [], {}
    for event in streamed:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            ((field, text),) = [(name, text) for name, text in event["delta"].items() if name != "type"]
            blocks[-1][field] = blocks[-1].get(field, "") + text
        elif event["type"] == "message_delta":
            ending = event["delta"]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = as_object(block.pop("partial_json", "{}"))
    return (blocks, ending["stop_reason"], ending["stop_sequence"]), (
        body["content"],
        body["stop_reason"],
        body["stop_sequence"],
    )


def as_object(text):
    try:
        value = json.loads(text)
    except ValueError:
        return {"arguments": text}
    return value if isinstance(value, dict) else {"arguments": text}


def of_response(streamed, body):
    return streamed[-1]["response"], body


READERS = {"chat": of_chat, "completion": of_completion, "message": of_message, "response": of_response}


@example(told_whole("chat", WHOLE))
@example(told_whole("message", WHOLE))
@given(stories())
def test_a_stream_adds_up_to_the_whole_answer(story):
    layout, sampling, [(tokens, finish)] = story
    written = {}
    for is_streaming in (True, False):
        form = formatter(layout, sampling, is_streaming=is_streaming)
        pieces = [form.feed(output)[0] for output in outputs(tokens, finish)]
        written[is_streaming] = b"".join(pieces) + form.finish(USAGE)
    streamed, whole = READERS[layout.kind](events(written[True]), json.loads(written[False]))
    assert streamed == whole


def test_the_story_has_thoughts_text_and_two_calls():
    """What the examples above are worth."""
    layout, sampling, [(tokens, finish)] = told_whole("chat", WHOLE)
    form = formatter(layout, sampling, is_streaming=False)
    for output in outputs(tokens, finish):
        form.feed(output)
    body = json.loads(form.finish(USAGE))
    message = body["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("I look.done EN", "hm ☃…")
    assert [called(call)[1:] for call in message["tool_calls"]] == [
        ("f", '{"a": "é☃ \\"\\u00e9}"}'),
        ("shell", 'ls "é\n😀'),
    ]
