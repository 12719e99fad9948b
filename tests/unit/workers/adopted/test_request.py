"""What an unmodified server gets to see of a request."""

import numpy as np
import pytest

from planes.wire.errors import InvalidRequest
from planes.wire.frames import DecodeLeg, LocalLeg, Parsing, PrefillLeg, Sampling, StructuredOutput
from planes.wire.messages import HandoverMode, RequestId
from workers.adopted.request import drawn_again, generate_body, is_streamed
from workers.engine.base import EngineRequest

VOCABULARY = [b"a", b" bad", b"word", b"\xff"]
EOS = [2]


def request(leg=None, *, resume=(), salt="", priority=0, parsing=None, **sampling):
    leg = LocalLeg() if leg is None else leg
    sampling = Sampling(**({"max_tokens": 8, "temperature": 0.0} | sampling))
    prompt = np.array([5, 6, 7], dtype=np.uint32)
    return EngineRequest(
        RequestId("r"), prompt, sampling, leg, tuple(resume), cache_salt=salt, priority=priority, parsing=parsing
    )


def body(asked, handover=None):
    return generate_body(asked, EOS, handover, VOCABULARY)


def sampled(asked):
    return body(asked)["sampling_params"]


def test_a_local_request_is_streamed_with_its_tokens():
    told = body(request(salt="tenant", priority=-3))
    assert (told["token_ids"], told["stream"], told["cache_salt"], told["priority"]) == ([5, 6, 7], True, "tenant", -3)
    assert (told["stream_options"], told["reasoning_ended"]) == ({"include_usage": True}, True)
    assert "kv_transfer_params" not in told
    assert "model" not in told
    assert told["sampling_params"]["stop_token_ids"] == EOS
    assert told["sampling_params"]["detokenize"] is False


def test_what_is_not_asked_for_is_not_sent():
    told = body(request())
    assert "cache_salt" not in told
    assert None not in told["sampling_params"].values()
    assert "extra_args" not in told["sampling_params"]


def test_a_prefill_leg_is_one_token_in_a_whole_answer():
    asked = request(PrefillLeg(HandoverMode.PULL))
    told = body(asked, {"do_remote_decode": True})
    assert (told["stream"], told["sampling_params"]["max_tokens"]) == (False, 1)
    assert told["kv_transfer_params"] == {"do_remote_decode": True}
    assert not is_streamed(asked)


def test_prompt_logprobs_come_in_a_whole_answer():
    told = body(request(prompt_logprobs=2))
    assert (told["stream"], told["sampling_params"]["prompt_logprobs"]) == (False, 2)


def test_a_resumed_stream_is_a_longer_prompt_and_a_shorter_answer():
    told = body(request(resume=(8, 9), max_tokens=8, min_tokens=3))
    assert told["token_ids"] == [5, 6, 7, 8, 9]
    assert (told["sampling_params"]["max_tokens"], told["sampling_params"]["min_tokens"]) == (6, 1)
    assert sampled(request(resume=(8, 9), min_tokens=1))["min_tokens"] == 0


def test_a_decode_leg_draws_the_client_s_token_once_more():
    asked = request(DecodeLeg(), resume=(8,))
    assert body(asked)["token_ids"] == [5, 6, 7]
    assert sampled(asked)["max_tokens"] == 8
    assert drawn_again(asked) == 8
    assert drawn_again(request(DecodeLeg())) is None
    assert drawn_again(request(resume=(8,))) is None


@pytest.mark.parametrize(("asked", "sent"), [(None, None), (0, 0), (3, 4), (20, 20)])
def test_one_more_alternative_is_asked_for_than_is_wanted(asked, sent):
    """Of n alternatives the server tells n - 1 where the token itself is not among them."""
    assert sampled(request(logprobs=asked)).get("logprobs") == sent


@pytest.mark.parametrize(
    ("structured", "sent"),
    [
        (StructuredOutput(json_schema='{"type":"object"}'), {"json": '{"type":"object"}'}),
        (StructuredOutput(regex="a+"), {"regex": "a+"}),
        (StructuredOutput(choice=["a", "b"]), {"choice": ["a", "b"]}),
        (StructuredOutput(grammar="root ::= x"), {"grammar": "root ::= x"}),
        (StructuredOutput(structural_tag="{}"), {"structural_tag": "{}"}),
    ],
)
def test_what_an_answer_must_match_is_said_in_vllm_s_words(structured, sent):
    assert sampled(request(structured=structured))["structured_outputs"] == sent


def test_bad_words_are_sent_as_texts():
    assert sampled(request(bad_words=[[1, 2], [0], [2]]))["bad_words"] == ["a", "badword", "word"]
    with pytest.raises(InvalidRequest):
        body(request(bad_words=[[3]]))


def test_a_thinking_model_s_server_finds_the_end_of_thoughts_itself():
    told = body(request(parsing=Parsing(has_reasoning=True, template_kwargs=b'{"enable_thinking":true}')))
    assert told["reasoning_parser_kwargs"] == {"chat_template_kwargs": {"enable_thinking": True}}
    assert "reasoning_ended" not in told
