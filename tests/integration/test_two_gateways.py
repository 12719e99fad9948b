"""Two gateways over one fleet serve the same, and each counts what the other has bound."""

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


async def test_each_counts_what_the_other_has_bound_until_it_ends_or_the_gateway_is_killed(site, reach, until, unique):
    await site.worker("both-1", speedup=1)
    asked, counting = [await site.gateway(num_workers=1) for _ in range(2)]
    async with reach(asked) as one, reach(counting) as other:

        async def counts(number):
            peers = await other.metric("headrace_peer_gateways")
            return (peers, await other.metric("headrace_peer_requests_bound")) == (1, number)

        await until(lambda: counts(0))
        async with one.stream(unique, max_tokens=4000) as stream:
            await stream.read(3)
            await until(lambda: counts(1))
        await until(lambda: counts(0))
        async with one.stream(unique, max_tokens=4000) as stream:
            await stream.read(3)
            await until(lambda: counts(1))
            asked.process.kill()

            async def is_forgotten():
                return (
                    await other.metric("headrace_peer_gateways") + await other.metric("headrace_peer_requests_bound")
                    == 0
                )

            await until(is_forgotten)
