"""What a server says of a request, as recorded from vLLM 0.32, in our words."""

import msgspec
import numpy as np
import pytest

from planes.wire.frames import DecodeLeg, FinishReason, LocalLeg, Sampling
from planes.wire.messages import RequestId
from tests.unit.workers.adopted.vllm_server import chunk, usage, whole
from workers.adopted.answer import Answer, OtherToken, decode_chunk, events
from workers.engine.base import EngineRequest, TokenLogprob

LOGPROBS = {
    "content": [
        {
            "token_id": 9,
            "logprob": -3.9,
            "rank": 4,
            "top_logprobs": [
                {"token_id": 9, "logprob": -3.9, "rank": 4},
                {"token_id": 7, "logprob": -0.1, "rank": 1},
                {"token_id": 8, "logprob": -1.5, "rank": 2},
            ],
        }
    ]
}


def answer(*, leg=None, skipped=None, **sampling):
    sampling = Sampling(**({"max_tokens": 8, "temperature": 0.0} | sampling))
    leg = LocalLeg() if leg is None else leg
    request = EngineRequest(RequestId("r"), np.array([1, 2], dtype=np.uint32), sampling, leg)
    return Answer(request, started_at=10.0, skipped=skipped)


def fed(to, *said, now=11.0):
    return [output for each in said for output in to.feed(decode_chunk(msgspec.json.encode(each)), now=now)]


def test_tokens_come_as_they_are_said_and_the_end_with_what_was_cached():
    folded = answer()
    (first,) = fed(folded, chunk([7]), now=11.0)
    (second,) = fed(folded, chunk([8, 9]), now=12.0)
    assert fed(folded, chunk([3], "length"), now=13.0) == []
    assert folded.is_complete
    (last,) = fed(folded, usage(64), now=13.0)
    assert [first.tokens, second.tokens, last.tokens] == [(7,), (8, 9), (3,)]
    assert (first.prefill_s, first.finish, last.finish) == (1.0, None, FinishReason.LENGTH)
    assert (last.cached_tokens, last.prefill_s, last.decode_s) == (64, 1.0, 2.0)


def test_an_end_without_usage_is_an_end():
    folded = answer()
    fed(folded, chunk([7], "stop"))
    (last,) = folded.ended()
    assert (last.tokens, last.finish) == ((7,), FinishReason.STOP)
    assert folded.ended() == []


@pytest.mark.parametrize(
    ("said", "finish"),
    [("abort", FinishReason.ABORT), ("error", FinishReason.ERROR), ("repetition", FinishReason.ERROR)],
)
def test_other_ends_are_failures(said, finish):
    folded = answer()
    fed(folded, chunk([], said))
    (last,) = folded.ended()
    assert last.finish is finish
    assert bool(last.error) == (finish is FinishReason.ERROR)


def test_a_whole_answer_is_one_output():
    folded = answer()
    assert fed(folded, whole([7, 8], cached=32)) == []
    (only,) = folded.ended()
    assert (only.tokens, only.finish, only.cached_tokens) == ((7, 8), FinishReason.LENGTH, 32)


def test_a_token_s_alternatives_are_the_likeliest_best_first():
    (output,) = fed(answer(logprobs=2), chunk([9], logprobs=LOGPROBS))
    assert output.logprobs == (TokenLogprob(9, -3.9, ((7, -0.1), (8, -1.5)), 4),)


def test_a_prompt_s_log_probabilities_come_first_of_all():
    folded = answer(prompt_logprobs=1)
    of_second = {"2": {"logprob": -5.0, "rank": 40, "decoded_token": None}, "7": {"logprob": -0.5, "rank": 1}}
    fed(folded, whole([7], prompt_logprobs=[None, of_second]))
    (only,) = folded.ended()
    assert only.prompt_logprobs == (None, TokenLogprob(2, -5.0, ((7, -0.5),), 40))


def test_choices_keep_their_places():
    folded = answer(n=2, temperature=1.0)
    outputs = fed(folded, chunk([7], index=1), chunk([8]), chunk([9], "stop", index=1), chunk([6], "length"))
    outputs += fed(folded, usage(0))
    assert [(o.index, o.tokens, o.finish) for o in outputs] == [
        (1, (7,), None),
        (0, (8,), None),
        (1, (9,), FinishReason.STOP),
        (0, (6,), FinishReason.LENGTH),
    ]


def test_one_greedy_answer_stands_for_all_choices():
    folded = answer(n=2)
    outputs = fed(folded, chunk([7], "stop"), usage(0))
    assert sorted((o.index, o.tokens, o.finish) for o in outputs) == [
        (0, (7,), FinishReason.STOP),
        (1, (7,), FinishReason.STOP),
    ]
    assert folded.is_complete


def test_the_token_that_the_client_has_is_left_out():
    folded = answer(leg=DecodeLeg(), skipped=9, logprobs=2)
    assert fed(folded, chunk([9], logprobs=LOGPROBS)) == []
    (output,) = fed(folded, chunk([8]), now=12.0)
    assert (output.tokens, output.prefill_s) == ((8,), 0.0)


def test_it_may_be_the_last_one():
    folded = answer(leg=DecodeLeg(), skipped=9)
    (last,) = fed(folded, chunk([9], "stop"), usage(0))
    assert (last.tokens, last.finish, last.handover_s) == ((), FinishReason.STOP, 1.0)


def test_another_token_than_the_client_has_is_noticed():
    with pytest.raises(OtherToken):
        fed(answer(leg=DecodeLeg(), skipped=9), chunk([8]))


async def test_events_are_found_wherever_a_stream_is_cut():
    stream = b'data: {"a":1}\n\n: comment\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'

    async def cut(size):
        for start in range(0, len(stream), size):
            yield stream[start : start + size]

    for size in range(1, len(stream) + 1):
        assert [event async for event in events(cut(size))] == [b'{"a":1}', b'{"b":2}', b"[DONE]"]
