import random

import pytest

from app.prompt.nonce import without_nonce
from loadtest.client import Sample
from loadtest.nonces import outcome, system_prompt


def sample(prompt_tokens, cached_tokens, ttft_s=0.1, **fields):
    told = {"status": 200, "prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens} | fields
    return Sample(1.0, first_token_at=1.0 + ttft_s, **told)


def test_the_hit_rate_is_of_tokens_not_of_requests():
    found = outcome([sample(100, 0, 0.3), sample(300, 200, 0.1)])
    assert (found.requests, found.prompt_tokens, found.hit_rate) == (2, 400, 0.5)
    assert found.ttft_p50_s == pytest.approx(0.2)


@pytest.mark.parametrize("fields", [{"status": 503}, {"error": "connection lost"}])
def test_one_that_failed_ends_the_run(fields):
    with pytest.raises(RuntimeError, match="1 of 2 requests failed"):
        outcome([sample(100, 0), sample(100, 0, **fields)])


def test_the_line_is_new_in_each_request_and_one_that_the_gateway_drops():
    rng = random.Random(1)
    first, second = (system_prompt("Be brief.", rng, has_line=True) for _ in range(2))
    assert first != second
    for content in (first, second):
        (message,) = without_nonce(({"role": "system", "content": content},))
        assert message["content"] == "Be brief." == system_prompt("Be brief.", rng, has_line=False)
