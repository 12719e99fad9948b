import msgspec
import numpy as np
import pytest

from app.serving.request import GatewayRequest
from planes.wire.frames import Format, Sampling, StructuredOutput
from planes.wire.messages import RequestId


def request(max_tokens=50, kind="chat", *, is_streaming=False, **sampling):
    return GatewayRequest(
        request=RequestId("r"),
        model="m",
        prompt=np.arange(100, dtype=np.uint32),
        blocks=np.arange(6, dtype=np.uint64),
        block_size=16,
        sampling=Sampling(max_tokens, **sampling),
        format=Format(kind, "", "m", 0, is_streaming=is_streaming),
        arrived_at=0.0,
        deadline=60.0,
        card_digest="c" * 64,
    )


def test_the_router_is_told_what_a_worker_must_have():
    routable = request().routable(num_tokens=0, excluded=frozenset(), is_retry=False)
    assert (routable.card_digest, routable.block_size, routable.max_context) == ("c" * 64, 16, 150)


def test_a_vector_takes_nothing_of_the_context_beside_its_prompt():
    routable = request(1, kind="embedding").routable(num_tokens=0, excluded=frozenset(), is_retry=False)
    assert routable.max_context == 100


def test_a_request_that_goes_on_elsewhere_grows_no_further_than_it_would_have():
    routable = request().routable(num_tokens=20, excluded=frozenset(), is_retry=True)
    assert (routable.max_context, routable.expected_tokens, routable.is_local_only) == (150, 30, True)


def test_the_log_probabilities_of_a_prompt_are_one_workers():
    asked = request(prompt_logprobs=0)
    assert asked.routable(num_tokens=0, excluded=frozenset(), is_retry=False).is_local_only
    assert not asked.is_resumable
    assert not request().routable(num_tokens=0, excluded=frozenset(), is_retry=False).is_local_only


def test_whatever_goes_on_elsewhere_without_a_loss_may_have_its_first_token_early():
    for sampling in ({}, {"bad_words": [[1, 2]]}, {"thinking_tokens": 5}, {"seed": 1}, {"presence_penalty": 1.0}):
        assert request(is_streaming=True, **sampling).is_first_token_early
    assert not request(is_streaming=True, n=2).is_first_token_early
    assert not request(is_streaming=True, kind="response", logprobs=2).is_first_token_early
    assert not request().is_first_token_early
    assert request(max_tokens=1).is_first_token_early


OWN = [
    {"seed": 1},
    {"presence_penalty": 0.1},
    {"frequency_penalty": -0.1},
    {"bad_words": [[1, 2]]},
    {"thinking_tokens": 5},
    {"structured": StructuredOutput(regex="a")},
]


@pytest.mark.parametrize("sampling", OWN)
def test_what_depends_on_an_answer_s_own_tokens_goes_on_only_where_they_are_known(sampling):
    known = request(is_streaming=True, **sampling)
    assert known.is_resumable
    unknown = msgspec.structs.replace(known, has_own_tokens=False)
    assert not unknown.is_resumable
    assert not unknown.is_first_token_early


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.2, "min_tokens": 3, "logit_bias": {1: 2.0}}])
def test_a_token_that_must_be_drawn_again_may_come_early_where_it_comes_out_the_same(sampling):
    drawn = request(is_streaming=True, **sampling)
    greedy = request(is_streaming=True, temperature=0.0, **sampling)
    assert drawn.is_first_token_early
    drawn, greedy = (msgspec.structs.replace(each, has_own_tokens=False) for each in (drawn, greedy))
    assert drawn.is_resumable
    assert not drawn.is_first_token_early
    assert greedy.is_first_token_early


def test_a_seed_changes_nothing_where_nothing_is_drawn():
    greedy = request(is_streaming=True, temperature=0.0, seed=1)
    assert msgspec.structs.replace(greedy, has_own_tokens=False).is_resumable


@pytest.mark.parametrize(
    ("kind", "is_streaming", "logprobs", "is_resumable"),
    [
        ("chat", False, None, True),
        ("chat", False, 2, False),
        ("chat", True, 2, True),
        ("response", True, None, True),
        ("response", True, 2, False),  # its end says all of them again
    ],
)
def test_what_another_worker_can_go_on_with(kind, is_streaming, logprobs, is_resumable):
    found = request(kind=kind, is_streaming=is_streaming, logprobs=logprobs)
    assert found.is_resumable is is_resumable
