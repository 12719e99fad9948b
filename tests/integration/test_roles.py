"""Workers change their roles while they run: nothing is lost, and no answer is another one for it."""

import asyncio
import itertools
import random

import pytest

from app.cli.role import RoleRefused, RoleSettings, change_role
from planes.wire.messages import Role, WorkerId

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

NUM_CHANGES = 50
WORKERS = ("prefill-1", "prefill-2", "decode-1", "decode-2")


def settings(site, **changes):
    return RoleSettings(etcd=site.etcd, namespace=site.namespace, **changes)


@pytest.fixture
def command(site):
    """Runs a command of the fleet's operator: its exit status and what it said."""

    async def run(*arguments):
        flags = ["--etcd", site.etcd, "--namespace", site.namespace]
        process = site.start("command", ["app.cli", *arguments, *flags])
        return await process.ended(), process.log.read_text().strip()

    return run


class Load:
    """Clients that ask one question after the other, streamed or not, of several gateways."""

    def __init__(self, clients, unique):
        self.clients, self.unique = clients, unique
        self.rng = random.Random(12)
        self.is_over = False
        self.answers = {}
        """By prompt and tokens."""
        self.pairs = set()
        self.numbers = itertools.count()

    async def ask(self, api):
        while not self.is_over:
            number = next(self.numbers)
            prompt = f"{number} {self.unique} " + "Mills grind. " * self.rng.choice([1, 10, 100])
            num_tokens = self.rng.choice([1, 20, 100, 700])
            if number % 3:
                async with api.stream(prompt, max_tokens=num_tokens) as stream:
                    text = await stream.read()
                    assert (stream.is_done, stream.finish, stream.error) == (True, "length", None)
                    headers = stream.headers
            else:
                response = await api.chat(prompt, max_tokens=num_tokens)
                assert response.status_code == 200, response.text
                text, headers = response.json()["choices"][0]["message"]["content"], response.headers
            self.answers[prompt, num_tokens] = text
            self.pairs.add((headers["x-headrace-prefill"], headers["x-headrace-decode"]))

    async def run(self, num_clients):
        await asyncio.gather(*(self.ask(self.clients[index % len(self.clients)]) for index in range(num_clients)))


@pytest.mark.parametrize("dispatch", ["direct", "queue"])
async def test_fifty_changes_of_role_under_load_cost_no_request_and_no_token(site, reach, alone, unique, dispatch):
    flags = ("--prefill-dispatch", dispatch)
    for name in WORKERS:
        site.start_worker(name, *flags, speedup=2)
    predicting = await site.gateway(*flags, num_workers=len(WORKERS))
    pairing = await site.gateway("--policy", "round_robin", *flags, num_workers=len(WORKERS))
    rng = random.Random(7)
    async with reach(predicting) as one, reach(pairing) as other:
        load = Load([one, other], unique)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(8))
            num_changed = 0
            while num_changed < NUM_CHANGES:
                name, role = WorkerId(rng.choice(WORKERS)), rng.choice(list(Role))
                if role == (await one.fleet())[name]["role"]:
                    continue
                try:
                    moves = settings(site, migrate_after_s=rng.choice([None, 0.0]))
                    is_changed, told = await change_role(name, role, moves)
                except RoleRefused:
                    continue  # nobody else would decode
                assert is_changed, told
                num_changed += 1
            load.is_over = True
        assert len({prefill for prefill, _ in load.pairs}) == len({decode for _, decode in load.pairs}) == len(WORKERS)
        for (prompt, num_tokens), text in load.answers.items():
            assert text == await alone.text(prompt, max_tokens=num_tokens)


async def test_a_worker_that_stops_decoding_ends_its_streams_first_and_gets_no_new_ones(
    site, reach, alone, unique, until, command
):
    for name in ("prefill-1", "decode-1", "decode-2"):
        site.start_worker(name, speedup=0.5)
    gateway = await site.gateway("--policy", "round_robin", num_workers=3)
    async with reach(gateway) as api, api.stream(unique, max_tokens=1500) as stream:
        await stream.read(5)
        changed = stream.headers["x-headrace-decode"]
        (other,) = {"decode-1", "decode-2"} - {changed}
        status, said = await command("role", changed, "prefill", "--wait-s", "0.5")
        assert (status, said) == (
            1,
            f"{changed} is decode and becomes prefill when it has ended what it will not do any more",
        )
        assert f"decode → {'prefill'}" in (await command("fleet", "--nats", site.nats))[1]
        for index in range(4):
            headers = (await api.chat(f"{index} {unique}")).headers
            assert (headers["x-headrace-prefill"], headers["x-headrace-decode"]) == ("prefill-1", other)
        told = (await api.fleet())[changed]
        assert (told["role"], told["becoming"], told["state"]) == ("decode", "prefill", "ready")
        assert await stream.read() == await alone.text(unique, max_tokens=1500)
        assert (stream.is_done, stream.finish) == (True, "length")
        assert await command("role", changed, "prefill") == (0, f"{changed} is prefill")

        async def prefills():
            headers = (await api.chat(unique)).headers
            assert headers["x-headrace-decode"] == other
            return headers["x-headrace-prefill"] == changed

        await until(prefills)
        assert await api.metric("headrace_migrations_total") == 0
        status, said = await command("role", other, "prefill")
        assert status == 2
        assert "no other worker of model 'sim' decodes, so nobody would answer" in said
