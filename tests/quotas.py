"""Whether limits hold and usage is exact: requests of 20 keys over two gateways, a third of them cancelled.

    python -m tests.quotas --requests 10000

Starts everything itself. What keys have used must be what the simulated workers have computed, to the token; no key
may exceed a limit by more than a request. `tests/integration/test_usage.py` does the same with some hundreds.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec

from app.cli.servers import etcd_server, nats_server
from app.keys.record import KIND, created
from app.keys.tenant import KeyTerms
from planes.control import Etcd
from planes.entries import NEW, Entries
from tests.integration.conftest import Api, Gateway, Site

NUM_KEYS = 20
_AT_ONCE = 24


@dataclass
class Outcome:
    """used: lines of `/v1/usage`.  computed: prompt and completion tokens that workers have counted."""

    terms: dict[str, KeyTerms]
    statuses: dict[str, Counter] = field(default_factory=dict)
    used: list[dict] = field(default_factory=list)
    computed: tuple[int, int] = (0, 0)
    answered: Counter = field(default_factory=Counter)
    """Tokens in the answers that came to their end, by key."""
    num_cancelled: int = 0
    reader: Gateway | None = None
    """A third gateway, which has told `used`."""
    failures: list[str] = field(default_factory=list)
    """What clients were told that were neither served nor beyond a limit."""

    def of(self, key, what):
        return sum(line[what] for line in self.used if line["key"] == key)

    @property
    def total(self):
        """Prompt and completion tokens of all usage."""
        return tuple(sum(line[what] for line in self.used) for what in ("prompt_tokens", "completion_tokens"))

    def check(self):
        """Raises:  AssertionError."""
        assert not self.failures
        assert self.total == self.computed
        for key, terms in self.terms.items():
            tokens = self.of(key, "prompt_tokens") + self.of(key, "completion_tokens")
            requests, statuses = self.of(key, "requests"), self.statuses.get(key, Counter())
            assert tokens >= self.answered[key], key
            if terms.requests_per_day is not None:
                assert requests <= terms.requests_per_day, key
                assert not statuses[429] or requests >= 0.7 * terms.requests_per_day, key
            elif terms.tokens_per_day is not None:
                assert tokens <= terms.tokens_per_day, key
            else:
                assert not statuses[429], key
            assert set(statuses) <= {200, 429}, (key, statuses)


def terms_of(num_requests):
    """A quarter of the keys has room for half of its requests, a quarter for half of its tokens."""
    share = num_requests // NUM_KEYS
    limits = [
        {},
        {"requests_per_day": max(1, share // 2)},
        {"tokens_per_day": share * 60},
        {"tokens_per_minute": 10**9},
    ]
    return {f"key_{n}": KeyTerms(tenant=f"t{n % 7}", **limits[n % len(limits)]) for n in range(NUM_KEYS)}


async def run(site, num_requests, *, seed=1):
    """Send so many requests, and tell what came of them."""
    outcome = Outcome(terms_of(num_requests))
    secrets = {name: f"sk-hr-{name}" for name in (*outcome.terms, "key_admin")}
    admin = {"key_admin": KeyTerms(tenant="operator", admin=True)}
    async with Entries(Etcd(site.etcd), site.namespace, KIND).opened() as entries:
        for name, terms in (outcome.terms | admin).items():
            record = created(terms, secrets[name], now=datetime.now(UTC))
            assert await entries.swap(name, msgspec.json.encode(record), revision=NEW)
    workers = [await site.worker(name, speedup=20) for name in ("prefill-1", "decode-1", "both-1")]
    gateways = [site.start_gateway("--api-keys") for _ in range(2)]
    for gateway in gateways:
        await site.ready(gateway, len(workers))
        await gateway.process.says("event=keys.known")
    rng = random.Random(seed)
    numbers = iter(range(num_requests))
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=2 * _AT_ONCE)) as client:

        async def ask():
            for number in numbers:
                key = f"key_{rng.randrange(NUM_KEYS)}"
                await _ask(client, rng.choice(gateways).url, key, secrets[key], number, rng, outcome)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(_AT_ONCE):
                tasks.create_task(ask())
    for gateway in gateways:
        gateway.process.send(signal.SIGTERM)
        assert await gateway.process.ended() == 0
    outcome.reader = reader = await site.gateway("--api-keys", num_workers=len(workers))
    await reader.process.says("event=keys.known")
    async with Api(reader.url) as api:
        headers = {"authorization": f"Bearer {secrets['key_admin']}"}
        outcome.used = (await api.get("/v1/usage", headers=headers)).json()["data"]
    for worker in workers:
        worker.send(signal.SIGTERM)
    counted = [await worker.says("event=worker.counted") for worker in workers]
    outcome.computed = tuple(
        sum(int(word.partition("=")[2]) for line in counted for word in line.split() if word.startswith(f"{what}="))
        for what in ("prompt_tokens", "completion_tokens")
    )
    return outcome


async def _ask(client, url, key, secret, number, rng, outcome):
    is_cancelled, num_read = rng.random() < 1 / 3, rng.randrange(12)
    words = " ".join(rng.choice(("mill", "river", "stone", "wheel")) for _ in range(rng.randrange(3, 60)))
    body = {
        "model": "sim",
        "messages": [{"role": "user", "content": f"{number} {words}"}],
        "max_tokens": rng.randrange(1, 40) + 40 * is_cancelled,
        "ignore_eos": True,
        "stream": is_cancelled or rng.random() < 0.5,
        "stream_options": {"include_usage": True},
    }
    if not body["stream"]:
        del body["stream_options"]
    headers = {"authorization": f"Bearer {secret}"}
    statuses = outcome.statuses.setdefault(key, Counter())
    if is_cancelled and num_read == 0:  # before an answer has begun
        outcome.num_cancelled += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.001, 0.02)):
                statuses[(await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)).status_code] += 1
        return
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        statuses[response.status_code] += 1
        if response.status_code != 200:
            refused = msgspec.json.decode(await response.aread())["error"]
            if response.status_code != 429:
                outcome.failures.append(refused["message"])
            return
        if not body["stream"]:
            outcome.answered[key] += msgspec.json.decode(await response.aread())["usage"]["total_tokens"]
            return
        lines = 0
        async for line in response.aiter_lines():
            lines += bool(line)
            if is_cancelled and lines > num_read:
                outcome.num_cancelled += 1
                return
            if line.startswith("data: {") and (usage := msgspec.json.decode(line[6:]).get("usage")):
                outcome.answered[key] += usage["total_tokens"]


async def _main(num_requests, seed):
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        async with etcd_server(logs / "etcd") as etcd, nats_server(logs / "nats") as nats:
            site = Site(etcd.url, nats.url, logs)
            try:
                begun = time.monotonic()
                outcome = await run(site, num_requests, seed=seed)
            finally:
                site.close()
    for key in outcome.terms:
        terms = outcome.terms[key]
        print(
            f"{key:8} requests {outcome.of(key, 'requests'):6} of {terms.requests_per_day or '-':>6}  tokens "
            f"{outcome.of(key, 'prompt_tokens') + outcome.of(key, 'completion_tokens'):8} of "
            f"{terms.tokens_per_day or '-':>8}  answers {dict(outcome.statuses.get(key, {}))}"
        )
    print(
        f"{outcome.num_cancelled} cancelled; {time.monotonic() - begun:.0f} s; computed {outcome.computed}, "
        f"used {outcome.total}"
    )
    print(*outcome.failures[:5], sep="\n")
    outcome.check()
    print("usage equals what the workers computed, and no key exceeds a limit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    asyncio.run(_main(asked.requests, asked.seed))
