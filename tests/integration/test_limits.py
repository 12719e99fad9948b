"""Limits of keys over two gateways, with a real etcd."""

import asyncio
import time
from datetime import UTC, datetime

import msgspec
import pytest

from app.keys.record import KIND, created
from app.keys.tenant import KeyTerms
from planes.control import Etcd
from planes.entries import NEW, Entries

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
async def make_key(site):
    """Makes a key in etcd, without a command of its own for each."""

    async def make(name, **terms):
        secret = f"sk-hr-{name}"
        record = created(KeyTerms(tenant=name, **terms), secret, now=datetime.now(UTC))
        async with Entries(Etcd(site.etcd), site.namespace, KIND).opened() as entries:
            assert await entries.swap(name, msgspec.json.encode(record), revision=NEW)
        return {"authorization": f"Bearer {secret}"}

    return make


@pytest.fixture
async def both(site, reach):
    """Two gateways that ask for keys, over one worker."""
    await site.worker("both-1", speedup=50)
    gateways = [site.start_gateway("--api-keys") for _ in range(2)]
    for gateway in gateways:
        await site.ready(gateway, 1)
        await gateway.process.says("event=keys.known")
    async with reach(gateways[0]) as one, reach(gateways[1]) as other:
        yield one, other


async def known(until, both, key):
    async def is_known():
        return all([(await api.get("/v1/models", headers=key)).status_code == 200 for api in both])

    await until(is_known)


async def test_two_gateways_let_in_as_many_requests_as_one_key_may_make(both, make_key, until):
    key = await make_key("t", requests_per_day=40)
    await known(until, both, key)
    answers = await asyncio.gather(*(both[n % 2].chat(f"{n}", max_tokens=1, headers=key) for n in range(60)))
    served, refused = ([answer for answer in answers if answer.status_code == status] for status in (200, 429))
    assert (len(served), len(refused)) == (40, 20)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    midnight = 86_400 - time.time() % 86_400
    assert abs(int(refused[0].headers["retry-after"]) - midnight) < 60
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "40"
        assert "x-ratelimit-reset-requests" in answer.headers
    assert refused[-1].headers["x-ratelimit-remaining-requests"] == "0"


async def test_tokens_are_settled_to_what_was_used(both, make_key, until):
    key = await make_key("t", tokens_per_day=2000)
    await known(until, both, key)
    used = (await both[0].chat("one", max_tokens=100, headers=key)).json()["usage"]["total_tokens"]
    assert (await both[0].chat("one", max_tokens=1, headers=key)).headers["x-ratelimit-limit-tokens"] == "2000"
    used += (await both[0].chat("one", max_tokens=1, headers=key)).json()["usage"]["total_tokens"] * 2
    refused = await both[0].chat("one", max_tokens=1900, headers=key)
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-remaining-tokens"] == str(2000 - used)
    served = await both[0].chat("one", max_tokens=100, stream=True, headers=key)
    assert served.headers["x-ratelimit-limit-tokens"] == "2000", "a stream's head says it too"
    too_long = await both[0].chat("x" * 2100, max_tokens=1, headers=key)
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "request_too_large")


async def test_sequences_at_once_are_limited_over_both_gateways(both, make_key, until, unique):
    key = await make_key("t", max_concurrent=1, admin=True)
    await known(until, both, key)
    running = asyncio.create_task(both[0].chat(unique, max_tokens=10_000, headers=key))

    async def is_running():
        return await both[0].metric("headrace_requests_bound", headers=key) == 1

    await until(is_running)
    refused = await both[1].chat(unique, max_tokens=1, headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    async def is_served():
        return (await both[1].chat(unique, max_tokens=1, headers=key)).status_code == 200

    await until(is_served)
