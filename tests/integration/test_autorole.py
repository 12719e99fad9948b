"""`--autorole`: one of the gateways changes roles as the load wants it, and what is under way ends as it would have."""

import asyncio
import itertools
import signal

import pytest

from app.fleet.autorole import OFFICE
from planes.control import Etcd
from planes.election import Candidate, OfficeLost
from planes.role_wishes import put_holders_wish, put_role_wish
from planes.wire.messages import Role, RoleWish, WorkerId
from tests.integration.conftest import ForgetfulEtcd

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FLAGS = ("--autorole", "--autorole-window-s", "2", "--slo-ttft-s", "0.001", "--slo-itl-ms", "8", "--no-refuse-late")
"""Nobody keeps such an SLO, and one answer at a time is all that it allows a worker: little load is much."""
LONG_PROMPTS, LONG_ANSWERS = (200, 8), (1, 400)
"""Sentences and tokens."""


class Candidates:
    """What a test drives in place of a gateway's."""

    def __init__(self, site, tasks):
        self.site, self.tasks = site, tasks

    def run(self, name, *, etcd=None, **fields):
        candidate = Candidate(etcd or Etcd(self.site.etcd), self.site.namespace, OFFICE, name, **fields)
        return candidate, self.tasks.create_task(candidate.run())


@pytest.fixture
async def candidates(site):
    async with asyncio.TaskGroup() as tasks:
        own = Candidates(site, tasks)
        yield own
        for task in list(tasks._tasks):
            task.cancel()


async def test_one_holds_the_office_and_the_next_one_takes_it_when_that_one_ends(candidates, until):
    one, running = candidates.run("one")
    await until(lambda: one.is_holder)
    other, _ = candidates.run("other")
    await until(lambda: other._lease is not None)
    await one.tell(b"1")
    await other.tell(b"2")
    assert await one.heard() == {"one": b"1", "other": b"2"}
    assert not other.is_holder
    running.cancel()
    await until(lambda: other.is_holder)
    assert not one.is_holder
    assert await other.heard() == {"other": b"2"}


async def test_who_was_not_told_that_the_office_is_taken_finds_out_and_holds_it(site, candidates, until):
    etcd = ForgetfulEtcd(site.etcd)
    one, _ = candidates.run("one", etcd=etcd)
    await until(lambda: one.is_holder)
    assert etcd.has_forgotten
    await one.act(f"/headrace/{site.namespace}/thing".encode(), b"1", ttl_s=60, may=lambda _: True)


async def test_who_has_lost_the_office_cannot_act_though_it_does_not_know(site, candidates, until):
    one, _ = candidates.run("one", ttl_s=60)
    await until(lambda: one.is_holder)
    key = f"/headrace/{site.namespace}/thing".encode()
    await one.act(key, b"1", ttl_s=60, may=lambda found: found is None)
    async with Etcd(site.etcd).session() as client:
        await client.revoke_lease(one._lease)  # as if it had been away for longer
    other, _ = candidates.run("other")
    await until(lambda: other.is_holder)
    assert one.is_holder, "it looks again after 20 s"
    with pytest.raises(OfficeLost, match="not held any more"):
        await one.act(key, b"2", ttl_s=60, may=lambda _: True)
    await other.act(key, b"3", ttl_s=60, may=lambda found: found == b"1")
    with pytest.raises(OfficeLost, match="somebody who goes first"):
        await other.act(key, b"4", ttl_s=60, may=lambda found: found != b"3")


async def test_a_wish_by_hand_goes_before_the_elected_ones(site, candidates, until):
    one, _ = candidates.run("one")
    await until(lambda: one.is_holder)
    etcd, worker = Etcd(site.etcd), WorkerId("w")
    ours = RoleWish(7, Role.PREFILL, is_pin=False)
    await put_holders_wish(one, site.namespace, worker, ours)
    await put_holders_wish(one, site.namespace, worker, ours)
    await put_role_wish(etcd, site.namespace, worker, RoleWish(7, Role.DECODE))
    with pytest.raises(OfficeLost):
        await put_holders_wish(one, site.namespace, worker, ours)
    await put_holders_wish(one, site.namespace, worker, RoleWish(8, Role.PREFILL, is_pin=False))


class Load:
    """Clients that ask for long prompts and short answers, or the other way round, until they are told to stop."""

    def __init__(self, clients, unique, shape):
        self.clients, self.unique, self.shape = clients, unique, shape
        self.is_over = False
        self.answers = {}
        self.numbers = itertools.count()

    async def ask(self, api):
        while not self.is_over:
            number, (num_sentences, num_tokens) = next(self.numbers), self.shape
            prompt = f"{number} {self.unique} " + "Mills grind. " * num_sentences
            if number % 3:
                async with api.stream(prompt, max_tokens=num_tokens) as stream:
                    text = await stream.read()
                    assert (stream.is_done, stream.finish, stream.error) == (True, "length", None)
            else:
                text = await api.text(prompt, max_tokens=num_tokens)
            self.answers[prompt, num_tokens] = text

    async def run(self, num_clients):
        await asyncio.gather(*(self.ask(self.clients[index % len(self.clients)]) for index in range(num_clients)))


async def num_prefill(api):
    return sum(worker["role"] == "prefill" for worker in (await api.fleet()).values())


async def num_changes(api):
    return await api.metric("headrace_autorole_changes_total")


async def test_one_gateway_changes_roles_under_load_and_when_it_is_killed_the_other_one_does(
    site, reach, alone, unique, until
):
    for name in ("prefill-1", "prefill-2", "both-1", "both-2"):
        site.start_worker(name, speedup=1)
    gateways = [await site.gateway(*FLAGS, num_workers=4) for _ in range(2)]
    async with reach(gateways[0]) as one, reach(gateways[1]) as other:

        async def told(api):
            return (await api.get("/v1/fleet")).json()["autorole"]

        async def elected():
            return [api for api in (one, other) if (await told(api))["is_elected"]]

        await until(elected)
        load = Load([one, other], unique, LONG_ANSWERS)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(24))

            async def has_changed():
                holders = await elected()
                return len(holders) == 1 and await num_changes(holders[0]) >= 1 and await num_prefill(other) < 2

            await until(has_changed)
            load.is_over = True
        holders = await elected()
        assert len(holders) == 1
        (holder,) = holders
        (waiting,) = [api for api in (one, other) if api is not holder]
        assert await num_changes(waiting) == 0
        for (prompt, num_tokens), text in load.answers.items():
            assert text == await alone.text(prompt, max_tokens=num_tokens)
        for api in (one, other):
            counted = await api.metric("headrace_requests_total")
            assert counted == await api.metric("headrace_requests_total", code="ok")

        dying = gateways[0] if holder is one else gateways[1]
        assert "role=both" in (dying.process.said("event=autorole.decided") or "")
        table = site.start("fleet", ["app.cli", "fleet", "--once", *site.flags])
        assert await table.ended() == 0
        assert "autorole, sim: " in table.log.read_text()
        dying.process.send(signal.SIGKILL)

        async def has_taken_over():
            return (await told(waiting))["is_elected"]

        await until(has_taken_over)
        load = Load([waiting], f"again {unique}", LONG_PROMPTS)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(24))

            async def has_more():
                return await num_prefill(waiting) > 1

            await until(has_more)
            load.is_over = True
        for (prompt, num_tokens), text in load.answers.items():
            assert text == await alone.text(prompt, max_tokens=num_tokens)
        assert await num_changes(waiting) >= 1
        assert await waiting.metric("headrace_requests_total") == await waiting.metric(
            "headrace_requests_total", code="ok"
        )


async def test_a_worker_pinned_by_hand_is_shown_and_given_back(site, reach, until):
    for name in ("both-1", "both-2"):
        site.start_worker(name)
    gateway = await site.gateway(num_workers=2)

    async def command(*arguments):
        process = site.start("command", ["app.cli", *arguments, "--etcd", site.etcd, "--namespace", site.namespace])
        return await process.ended(), process.log.read_text().strip()

    async with reach(gateway) as api:
        assert await command("role", "both-1", "decode") == (0, "both-1 is decode; it was both")

        async def is_pinned():
            return (await api.fleet())["both-1"]["is_pinned"]

        await until(is_pinned)
        assert "decode, pinned" in (await command("fleet", "--nats", site.nats))[1]
        assert await command("role", "both-1", "auto") == (0, "both-1 is decode, and --autorole may change that")

        async def is_free():
            return not (await api.fleet())["both-1"]["is_pinned"]

        await until(is_free)
        assert (await api.get("/v1/fleet")).json()["autorole"] is None
