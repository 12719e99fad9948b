"""What vLLM says of a request, in our words; vLLM's objects are replaced by plain ones with the same names."""

from types import SimpleNamespace

import numpy as np
import pytest

from planes.wire.frames import DecodeLeg, FinishReason, LocalLeg, PrefillLeg, Sampling
from planes.wire.messages import HandoverEndpoint, HandoverMode, RequestId
from workers.engine.base import EngineOutput, EngineRequest
from workers.vllm.output import NO_ARRIVAL, Arrival, translate

PUSHED = DecodeLeg(source=HandoverEndpoint(HandoverMode.PUSH, "p-1", "127.0.0.1", 5600))


def request(leg=None, **sampling):
    return EngineRequest(
        RequestId("r"), np.arange(9, dtype=np.uint32), Sampling(max_tokens=8, **sampling), leg or LocalLeg()
    )


def from_vllm(*tokens, finish=None, logprobs=None, prompt_logprobs=None):
    """An output of one choice, queued at 10 s, scheduled at 12, with tokens from 15 to 19 s."""
    stats = SimpleNamespace(queued_ts=10.0, scheduled_ts=12.0, first_token_ts=15.0, last_token_ts=19.0)
    choice = SimpleNamespace(index=0, token_ids=list(tokens), logprobs=logprobs, finish_reason=finish)
    return SimpleNamespace(
        outputs=[choice], metrics=stats, num_cached_tokens=4, prompt_logprobs=prompt_logprobs
    ), choice


def ranked_as(rank, logprob):
    return SimpleNamespace(logprob=logprob, rank=rank)


def translated(output, leg=None, *, index=0, is_first=False, arrival=NO_ARRIVAL, **sampling):
    whole, choice = output
    return translate(request(leg, **sampling), whole, choice, index, is_first=is_first, arrival=arrival)


def test_an_output_amid_an_answer_is_its_tokens_and_nothing_else():
    assert translated(from_vllm(5, 6)) == EngineOutput(0, (5, 6))


@pytest.mark.parametrize(("is_first", "finish"), [(True, None), (False, "length"), (True, "stop")])
def test_the_first_and_the_last_output_tell_what_was_measured(is_first, finish):
    output = translated(from_vllm(5, finish=finish), is_first=is_first)
    assert output.finish == finish
    assert (output.cached_tokens, output.queue_s, output.prefill_s, output.decode_s) == (4, 2.0, 3.0, 4.0)


def test_a_handover_is_part_of_the_wait_and_leaves_nothing_to_prefill():
    output = translated(from_vllm(5), DecodeLeg(), is_first=True, arrival=Arrival(1.5, 1024))
    assert (output.queue_s, output.prefill_s) == (0.5, 0.0)
    assert (output.handover_s, output.handover_bytes) == (1.5, 1024)
    assert output.cached_tokens == 4


def test_a_pushed_leg_does_not_know_what_was_cached_where_the_prompt_was_computed():
    assert translated(from_vllm(5), PUSHED, is_first=True).cached_tokens == 0


def test_an_ending_that_is_not_known_is_an_error():
    output = translated(from_vllm(finish="repetition"))
    assert (output.finish, output.error) == (FinishReason.ERROR, "vLLM ended the request with 'repetition'")
    assert translated(from_vllm(5, finish="stop"), PrefillLeg(HandoverMode.PULL)).error == ""


def test_logprobs_name_the_token_and_the_best_alternatives():
    ranked = {5: ranked_as(4, -2.0), 7: ranked_as(1, -0.5), 8: ranked_as(2, -1.0)}
    (logprob,) = translated(from_vllm(5, logprobs=[ranked]), logprobs=2).logprobs
    assert (logprob.token, logprob.logprob, logprob.top) == (5, -2.0, ((7, -0.5), (8, -1.0)))
    assert logprob.rank == 4


def test_prompt_logprobs_come_with_the_first_output_alone_one_for_each_token():
    ranked = [{token: ranked_as(2, -1.0), 99: ranked_as(1, -0.5)} for token in range(1, 9)]
    whole = from_vllm(5, prompt_logprobs=[None, *ranked])
    told = translated(whole, is_first=True, prompt_logprobs=1).prompt_logprobs
    assert told[0] is None
    assert [(each.token, each.logprob, each.top) for each in told[1:]] == [
        (token, -1.0, ((99, -0.5),)) for token in range(1, 9)
    ]
    assert translated(whole, prompt_logprobs=1).prompt_logprobs == ()
