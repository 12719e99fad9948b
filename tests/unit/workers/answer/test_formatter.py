import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.frames import FinishReason, Format, Sampling, Usage
from workers.answer.detokenizer import load_vocabulary
from workers.answer.formatter import Formatter
from workers.answer.parts import Content
from workers.engine.base import EngineOutput, TokenLogprob

VOCABULARY = load_vocabulary(Path("workers/sim/model/tokenizer.json"))
END = 259
USAGE = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=4)


def layout(kind="chat", **changes):
    return Format(**{"kind": kind, "response_id": "id-1", "model": "sim", "created": 7, "is_streaming": True} | changes)


PROMPT = np.frombuffer(b"Say: ", np.uint8).astype(np.uint32)


def formatter(kind="chat", sampling=None, **changes):
    return Formatter(
        layout(kind, **changes),
        sampling or Sampling(max_tokens=99),
        VOCABULARY,
        end_tokens=frozenset({END}),
        prompt=PROMPT,
    )


def step(tokens, finish=None, index=0, logprobs=False):
    notes = tuple(TokenLogprob(token, -0.5, ((token, -0.5), (65, -2.0))) for token in tokens) if logprobs else ()
    return EngineOutput(index, tuple(tokens), notes, finish)


def events(written):
    chunks = written.decode().split("\n\n")
    assert chunks.pop() == ""
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks if chunk != "data: [DONE]"]


def text_of(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def run(form, outputs, usage=USAGE):
    return b"".join([form.feed(output)[0] for output in outputs] + [form.finish(usage)])


def test_a_streamed_chat_is_role_then_text_then_finish_then_done():
    written = run(formatter(), [step(b"H"), step(b"i"), step([END], FinishReason.STOP)])
    assert written.endswith(b"\n\ndata: [DONE]\n\n")
    role, first, second, closing = events(written)
    identity = {"id": "id-1", "object": "chat.completion.chunk", "created": 7, "model": "sim"}
    assert role == identity | {
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ]
    }
    assert first["choices"] == [{"index": 0, "delta": {"content": "H"}, "logprobs": None, "finish_reason": None}]
    assert second["choices"][0]["delta"] == {"content": "i"}
    assert closing["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]


def test_a_streamed_completion_has_text_and_no_role():
    first, closing = events(run(formatter("completion"), [step(b"H"), step([], FinishReason.LENGTH)]))
    assert first["object"] == "text_completion"
    assert first["choices"] == [{"index": 0, "text": "H", "logprobs": None, "finish_reason": None}]
    assert closing["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]


def test_usage_comes_in_a_last_chunk_without_choices_and_is_null_before():
    *others, last = events(run(formatter(include_usage=True), [step(b"H", FinishReason.LENGTH)]))
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_an_answer_that_is_not_streamed_is_one_body():
    form = formatter(is_streaming=False)
    assert form.feed(step(b"H")) == (b"", tuple(b"H"))
    assert form.feed(step([*b"i", END], FinishReason.STOP))[0] == b""
    body = json.loads(form.finish(USAGE))
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["total_tokens"] == 7


def test_a_completion_body_echoes_the_prompt():
    form = formatter("completion", is_streaming=False, echo="Say: ")
    form.feed(step(b"Hi", FinishReason.LENGTH))
    assert json.loads(form.finish(USAGE))["choices"][0]["text"] == "Say: Hi"


def test_a_streamed_completion_echoes_the_prompt_first():
    chunks = events(run(formatter("completion", echo="Say: "), [step(b"Hi", FinishReason.LENGTH)]))
    assert chunks[0]["choices"][0]["text"] == "Say: "
    assert text_of(chunks) == "Say: Hi"


def test_a_character_split_over_tokens_comes_in_one_event():
    chunks = events(run(formatter(), [step([byte]) for byte in "☃".encode()] + [step([], FinishReason.LENGTH)]))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "☃"},
        {},
    ]


def test_an_unfinished_character_is_flushed_at_the_end():
    chunks = events(run(formatter(), [step([0xE2], FinishReason.LENGTH)]))
    assert text_of(chunks) == "\ufffd"


def test_text_is_escaped_as_json():
    raw = 'a"\\\n\t\x01</script>'
    assert text_of(events(run(formatter(), [step(raw.encode(), FinishReason.LENGTH)]))) == raw


def test_a_stop_string_ends_the_choice_and_is_not_written():
    form = formatter(sampling=Sampling(max_tokens=99, stop=["END"]))
    first, counted = form.feed(step(b"go EN"))
    assert text_of(events(first)) == "go "
    assert counted == tuple(b"go EN")
    assert form.finish_reason is None
    last, counted = form.feed(step(b"D and more"))
    assert counted == tuple(b"D")
    assert form.finish_reason is FinishReason.STOP
    assert form.completion_tokens == 6
    (closing,) = events(last)
    assert closing["choices"][0]["finish_reason"] == "stop"
    assert form.feed(step(b"x", FinishReason.LENGTH)) == (b"", ())


def test_held_text_that_was_no_stop_string_is_flushed():
    form = formatter(sampling=Sampling(max_tokens=99, stop=["END"]))
    chunks = events(run(form, [step(b"go EN", FinishReason.LENGTH)]))
    assert text_of(chunks) == "go EN"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_strings_within_the_first_min_tokens_are_text():
    form = formatter(sampling=Sampling(max_tokens=99, min_tokens=3, stop=["a"]))
    chunks = events(run(form, [step(b"aaaba")]))
    assert text_of(chunks) == "aaab"


@pytest.mark.parametrize("steps", [[b"go END now"], [b"go E", b"N", b"D now"]])
def test_a_stop_string_is_written_if_asked_for_and_nothing_behind_it(steps):
    form = formatter(sampling=Sampling(max_tokens=99, stop=["END"], is_stop_included=True))
    assert text_of(events(run(form, [step(tokens) for tokens in steps]))) == "go END"
    assert form.finish_reason is FinishReason.STOP


def test_a_stop_token_is_written_if_stops_are_asked_for():
    form = formatter(sampling=Sampling(max_tokens=99, stop_token_ids=[33], is_stop_included=True))
    assert text_of(events(run(form, [step(b"Hi!", FinishReason.STOP)]))) == "Hi!"
    assert form.completion_tokens == 3


class Suspicious:
    """A parser that holds what follows a `<` until the answer's end."""

    reasoning_tokens = 0

    def __init__(self):
        self.held = ""

    def advance(self, text, token):
        del token
        text = self.held + text
        sure, mark, held = text.partition("<")
        self.held = mark + held
        return [Content(sure)] if sure else []

    def finish(self, text):
        return [Content(self.held + text)] if self.held + text else []


@pytest.mark.parametrize("is_streaming", [True, False])
def test_what_a_parser_holds_when_a_stop_string_ends_the_answer_is_let_go(is_streaming):
    form = Formatter(
        layout(is_streaming=is_streaming), Sampling(max_tokens=99, stop=["END"]), VOCABULARY, parser=Suspicious
    )
    written = run(form, [step(b"a <b EN"), step(b"D")])
    if is_streaming:
        assert text_of(events(written)) == "a <b "
    else:
        assert json.loads(written)["choices"][0]["message"]["content"] == "a <b "


def token_ids(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [token for choice in choices for token in choice["token_ids"]]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_token_ids_leave_with_the_next_event_and_none_is_missing(kind):
    form = formatter(kind, has_token_ids=True, include_usage=True)
    tokens = [*b"a", *"☃".encode(), 0xE2, END]
    written = run(form, [step([token], FinishReason.STOP if token == END else None) for token in tokens])
    chunks = events(written)[:-1]
    assert token_ids(chunks) == tokens
    texts = [choice.get("text", choice.get("delta", {}).get("content")) for (choice,) in (c["choices"] for c in chunks)]
    snowman = chunks[texts.index("☃")]
    assert snowman["choices"][0]["token_ids"] == [*"☃".encode()]
    assert snowman["usage"] is None


def test_the_prompts_token_ids_come_first_and_once():
    first, *others = events(run(formatter(has_token_ids=True), [step(b"ab", FinishReason.LENGTH)]))
    assert first["prompt_token_ids"] == PROMPT.tolist()
    assert not any("prompt_token_ids" in chunk for chunk in others)
    first, *others = events(run(formatter("completion", has_token_ids=True), [step(b"ab", FinishReason.LENGTH)]))
    assert first["choices"][0]["prompt_token_ids"] == PROMPT.tolist()
    assert not any("prompt_token_ids" in chunk["choices"][0] for chunk in others)


def test_a_whole_answer_lists_token_ids_where_vllm_does():
    form = formatter(has_token_ids=True, is_streaming=False)
    body = json.loads(run(form, [step([*b"Hi", END], FinishReason.STOP)]))
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == (PROMPT.tolist(), [*b"Hi", END])
    form = formatter("completion", has_token_ids=True, is_streaming=False)
    choice = json.loads(run(form, [step([*b"Hi", END], FinishReason.STOP)]))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (PROMPT.tolist(), [*b"Hi", END])


def test_who_did_not_ask_is_told_no_token_ids():
    assert b"token_ids" not in run(formatter(), [step(b"Hi", FinishReason.LENGTH)])
    assert b"token_ids" not in run(formatter(is_streaming=False), [step(b"Hi", FinishReason.LENGTH)])


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_event_tells_the_usage_so_far_if_asked_for(kind):
    form = formatter(kind, include_usage=True, has_continuous_usage=True)
    *chunks, last = events(run(form, [step(b"a"), step("é".encode()), step([END], FinishReason.STOP)]))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [0, 1, 3, 4][-len(counts) :]
    assert all(chunk["usage"]["total_tokens"] == len(PROMPT) + chunk["usage"]["completion_tokens"] for chunk in chunks)
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


def test_the_usage_so_far_is_each_choices_own():
    form = formatter(sampling=Sampling(max_tokens=9, n=2), include_usage=True, has_continuous_usage=True)
    form.feed(step(b"abc", index=1))
    _, chunk = events(form.feed(step(b"d", index=0))[0])
    assert chunk["usage"]["completion_tokens"] == 1


PROMPT_LOGPROBS = (
    None,
    *(TokenLogprob(token, -1.5, ((65, -0.5), (66, -1.0)), 3) for token in PROMPT.tolist()[1:-1]),
    TokenLogprob(32, float("-inf"), ((32, float("-inf")), (65, -0.5)), 1),
)


def with_prompt_logprobs(kind, **sampling):
    form = formatter(kind, Sampling(max_tokens=9, **sampling), is_streaming=False, echo="Say: " * (kind != "chat"))
    notes = (TokenLogprob(72, -0.5, ((72, -0.5),)),) if "logprobs" in sampling else ()
    form.feed(EngineOutput(0, (72,), notes, FinishReason.LENGTH, prompt_logprobs=PROMPT_LOGPROBS))
    return json.loads(form.finish(USAGE))


def test_the_prompts_log_probabilities_are_spelt_as_vllm_does():
    told = with_prompt_logprobs("chat", prompt_logprobs=2)["prompt_logprobs"]
    assert told[0] is None
    assert told[1] == {
        "97": {"logprob": -1.5, "rank": 3, "decoded_token": "a"},
        "65": {"logprob": -0.5, "rank": 1, "decoded_token": "A"},
        "66": {"logprob": -1.0, "rank": 2, "decoded_token": "B"},
    }
    assert told[-1]["32"] == {"logprob": -9999.0, "rank": 1, "decoded_token": " "}
    (choice,) = with_prompt_logprobs("completion", prompt_logprobs=2)["choices"]
    assert choice["prompt_logprobs"] == told
    assert choice["logprobs"] is None


def test_an_echoed_prompt_has_log_probabilities_too():
    (choice,) = with_prompt_logprobs("completion", prompt_logprobs=2, logprobs=1)["choices"]
    assert choice["text"] == "Say: H"
    assert choice["logprobs"] == {
        "tokens": ["S", "a", "y", ":", " ", "H"],
        "token_logprobs": [None, -1.5, -1.5, -1.5, -9999.0, -0.5],
        "top_logprobs": [
            None,
            {"A": -0.5, "a": -1.5},
            {"A": -0.5, "y": -1.5},
            {"A": -0.5, ":": -1.5},
            {" ": -9999.0},
            {"H": -0.5},
        ],
        "text_offset": [0, 1, 2, 3, 4, 5],
    }


def test_a_stop_token_counts_but_is_not_written():
    form = formatter(sampling=Sampling(max_tokens=99, stop_token_ids=[33]))
    chunks = events(run(form, [step(b"Hi!", FinishReason.STOP)]))
    assert text_of(chunks) == "Hi"
    assert form.completion_tokens == 3


def test_the_token_of_a_length_finish_is_written_even_if_it_could_stop():
    form = formatter(sampling=Sampling(max_tokens=3, stop_token_ids=[33], ignore_eos=True))
    assert text_of(events(run(form, [step(b"Hi!", FinishReason.LENGTH)]))) == "Hi!"


def test_choices_are_kept_apart():
    form = formatter(sampling=Sampling(max_tokens=2, n=2))
    written = form.feed(step(b"a", index=1))[0] + form.feed(step(b"b", index=0))[0]
    written += form.feed(step(b"c", FinishReason.LENGTH, index=1))[0]
    assert form.finish_reason is None
    written += form.feed(step(b"d", FinishReason.LENGTH, index=0))[0]
    assert form.finish_reason is FinishReason.LENGTH
    assert form.completion_tokens == 4
    assert (text_of(events(written), 0), text_of(events(written), 1)) == ("bd", "ac")


def test_chat_logprobs_name_tokens_bytes_and_alternatives():
    form = formatter(sampling=Sampling(max_tokens=9, logprobs=2))
    chunks = events(run(form, [step([0xC3], logprobs=True), step([0xA9], FinishReason.LENGTH, logprobs=True)]))
    first, second = chunks[1]["choices"][0], chunks[2]["choices"][0]
    assert first["delta"] == {"content": ""}
    assert second["delta"] == {"content": "é"}
    assert first["logprobs"] == {
        "content": [
            {
                "token": "bytes:\\xc3",
                "logprob": -0.5,
                "bytes": [0xC3],
                "top_logprobs": [
                    {"token": "bytes:\\xc3", "logprob": -0.5, "bytes": [0xC3]},
                    {"token": "A", "logprob": -2.0, "bytes": [65]},
                ],
            }
        ],
        "refusal": None,
    }


def test_completion_logprobs_have_the_legacy_shape_with_offsets():
    form = formatter("completion", Sampling(max_tokens=9, logprobs=1), is_streaming=False, echo=">>")
    form.feed(step(b"Hi", FinishReason.LENGTH, logprobs=True))
    assert json.loads(form.finish(USAGE))["choices"][0]["logprobs"] == {
        "tokens": ["H", "i"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "A": -2.0}, {"i": -0.5, "A": -2.0}],
        "text_offset": [2, 3],
    }


def test_an_impossible_token_has_a_finite_logprob():
    form = formatter(sampling=Sampling(max_tokens=9, logprobs=0), is_streaming=False)
    form.feed(EngineOutput(0, (72,), (TokenLogprob(72, float("-inf")),), FinishReason.LENGTH))
    assert json.loads(form.finish(USAGE))["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_the_token_that_ends_the_answer_has_no_logprob_entry():
    form = formatter(sampling=Sampling(max_tokens=9, logprobs=0), is_streaming=False)
    form.feed(step([*b"H", END], FinishReason.STOP, logprobs=True))
    assert len(json.loads(form.finish(USAGE))["choices"][0]["logprobs"]["content"]) == 1


def test_a_folded_ending_can_still_be_written():
    form = formatter(sampling=Sampling(max_tokens=9, stop=["b"]))
    form.fold(b"ab")
    assert form.finish_reason is FinishReason.STOP
    (closing,) = events(form.end(FinishReason.LENGTH))
    assert closing["choices"][0]["finish_reason"] == "stop"


def test_a_fold_that_reached_the_limit_can_still_be_ended():
    form = formatter(sampling=Sampling(max_tokens=2))
    form.fold([*b"a", 0xE2])
    chunks = events(form.end(FinishReason.LENGTH))
    assert text_of(chunks) == "\ufffd"
    assert form.finish_reason is FinishReason.LENGTH


PIECES = st.sampled_from([*b"abAB \n", *"é☃".encode(), 0xFF, 256, 258])


@st.composite
def stories(draw):
    """A request, its tokens in engine steps, and how it ended."""
    kind = draw(st.sampled_from(["chat", "completion"]))
    is_streaming = draw(st.booleans())
    sampling = Sampling(
        max_tokens=99,
        stop=draw(st.lists(st.text("abé☃\n", min_size=1, max_size=4), max_size=3)),
        min_tokens=draw(st.integers(0, 4)),
        logprobs=draw(st.sampled_from([None, 0, 2])) if is_streaming else None,
        is_stop_included=draw(st.booleans()),
    )
    tokens = draw(st.lists(PIECES, max_size=40))
    finish = draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
    if finish is FinishReason.STOP:
        tokens.append(END)
    echo = draw(st.sampled_from(["", "echo é"])) if kind == "completion" else ""
    form = layout(
        kind,
        is_streaming=is_streaming,
        include_usage=draw(st.booleans()),
        echo=echo,
        has_token_ids=draw(st.booleans()),
        has_continuous_usage=draw(st.booleans()),
    )
    return form, sampling, tokens, finish


def written_by(story, resume, cuts):
    """What a formatter writes for tokens `resume…` after folding the ones before; steps end at `cuts`."""
    form, sampling, tokens, finish = story
    subject = Formatter(form, sampling, VOCABULARY, end_tokens=frozenset({END}))
    if resume:
        subject.fold(tokens[:resume])
    if subject.finish_reason is not None:
        return subject.end(finish) + subject.finish(USAGE)
    edges = sorted({resume, len(tokens), *(cut for cut in cuts if resume < cut < len(tokens))})
    spans = list(itertools.pairwise(edges)) or [(resume, resume)]
    written = b""
    for start, end in spans:
        is_last = end == len(tokens)
        ending = finish if is_last else None
        written += subject.feed(step(tokens[start:end], ending, logprobs=sampling.logprobs is not None))[0]
    return written + subject.finish(USAGE)


@given(story=stories(), cuts=st.lists(st.integers(1, 40)), more_cuts=st.lists(st.integers(1, 40)))
def test_bytes_depend_on_tokens_and_not_on_engine_steps(story, cuts, more_cuts):
    assert written_by(story, 0, cuts) == written_by(story, 0, more_cuts)


@given(story=stories(), data=st.data())
def test_resumed_at_any_token_the_bytes_go_on_as_if_uninterrupted(story, data):
    form, sampling, tokens, finish = story
    resume = data.draw(st.integers(0, len(tokens) - (finish is FinishReason.STOP)))
    whole = written_by(story, 0, [])
    resumed = written_by(story, resume, data.draw(st.lists(st.integers(1, 40))))
    if not form.is_streaming:
        assert resumed == whole
        return
    before = Formatter(form, sampling, VOCABULARY, end_tokens=frozenset({END}))
    already = before.feed(step(tokens[:resume], logprobs=sampling.logprobs is not None))[0]
    if before.finish_reason is not None:  # the ending had been written; a resumed one writes it again and all after
        closing = Formatter(form, sampling, VOCABULARY)
        closing.fold(tokens[:resume])
        already = already.removesuffix(closing.end(finish))
    assert already + resumed == whole


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no dialect"):
        formatter("image")
