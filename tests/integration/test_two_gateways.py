"""Two gateways over one fleet know nothing of each other and serve the same."""

import asyncio

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

LONG = "Water turns the wheel and the wheel turns the stone. " * 10


async def test_both_see_the_same_fleet_and_give_the_same_answers(api, pairing, unique):
    one, other = await api.fleet(), await pairing.fleet()
    assert {name: worker["epoch"] for name, worker in one.items()} == {
        name: worker["epoch"] for name, worker in other.items()
    }
    texts = await asyncio.gather(*(client.text(unique, max_tokens=48) for _ in range(4) for client in (api, pairing)))
    assert len(set(texts)) == 1


async def test_each_learns_what_the_other_one_has_put_into_the_caches(api, pairing, unique, until):
    for asked, learning in ((api, pairing), (pairing, api)):
        prompt = f"{asked.url} {unique} {LONG}"
        response = await asked.chat(prompt)
        worker, num_tokens = response.headers["x-headrace-decode"], response.json()["usage"]["prompt_tokens"]

        async def has_learned(prompt=prompt, learning=learning, worker=worker, num_tokens=num_tokens):
            return (await learning.cached_tokens(prompt)).get(worker, 0) >= (num_tokens - 1) // 16 * 16

        await until(has_learned)


async def test_what_one_gateway_has_put_into_a_cache_the_other_one_finds_there(api, pairing, unique, until):
    first = await pairing.chat(unique + LONG)
    num_tokens = first.json()["usage"]["prompt_tokens"]

    async def has_learned():
        return max((await api.cached_tokens(unique + LONG)).values()) > 0

    await until(has_learned)
    second = (await api.chat(unique + LONG)).json()["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] == (num_tokens - 1) // 16 * 16
