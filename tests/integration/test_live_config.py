"""Routing settings that change while gateways run, set by `headrace config`."""

import asyncio

import pytest

from planes.control import Etcd, put_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
def config(site):
    """Runs the command: its exit status and what it said."""
    flags = ["--etcd", site.etcd, "--namespace", site.namespace]

    async def run(*arguments):
        process = site.start("config", ["app.cli", "config", *arguments, *flags])
        status = await process.ended()
        return status, process.log.read_text().strip()

    return run


async def routing(api):
    """The settings that a gateway follows."""
    return (await api.get("/v1/fleet")).json()["routing"]


async def test_a_valid_change_is_followed_at_once_and_clearing_it_undoes_it(site, reach, alone, unique, until, config):
    site.start_worker("both-1", speedup=2)
    gateway = await site.gateway("--policy", "round_robin", num_workers=1)

    async with reach(gateway) as api:

        async def decides(policy):
            return (await api.chat(unique, max_tokens=1)).headers["x-headrace-policy"] == policy

        assert await config() == (0, "{}")
        assert await decides("round_robin")
        async with api.stream(unique, max_tokens=400) as stream:
            await stream.read(5)
            assert await config("policy=dynamo", "slo_ttft_s=2.5") == (0, '{"policy":"dynamo","slo_ttft_s":2.5}')
            await until(lambda: decides("dynamo"))
            assert await stream.read() == await alone.text(unique, max_tokens=400)
        assert await config() == (0, '{"policy":"dynamo","slo_ttft_s":2.5}')
        followed = await routing(api)
        assert (followed["policy"], followed["slo_ttft_s"], followed["refused_because"]) == ("dynamo", 2.5, "")
        assert await config("--clear") == (0, "{}")
        await until(lambda: decides("round_robin"))
        assert await config() == (0, "{}")


async def test_waiting_requests_outlive_a_change(site, reach, alone, unique, until):
    """A prompt takes 3 s: most of them wait in the gateway's queue when the policy changes."""
    site.start_worker("both-1", "--sim-prefill-tokens-per-s", "30", speedup=1)
    gateway = await site.gateway(num_workers=1)
    prompts = [f"{index} {unique}" for index in range(6)]
    async with reach(gateway) as api:
        asking = [asyncio.create_task(api.chat(prompt, max_tokens=4)) for prompt in prompts]

        async def all_have_come():
            # In this order none is counted twice.
            stages = ("headrace_requests_total", "headrace_requests_bound", "headrace_requests_waiting")
            counts = [await api.metric(stage) for stage in stages]
            return counts[-1] > 1 and sum(counts) == len(prompts)

        await until(all_have_come)
        await put_config(Etcd(site.etcd), site.namespace, b'{"policy": "round_robin", "queue_limit": 1}')
        responses = await asyncio.gather(*asking)
        assert [response.status_code for response in responses] == [200] * 6
        assert {response.headers["x-headrace-policy"] for response in responses} >= {"round_robin"}
        texts = [response.json()["choices"][0]["message"]["content"] for response in responses]
        assert texts == await asyncio.gather(*(alone.text(prompt, max_tokens=4) for prompt in prompts))


async def test_what_gateways_would_refuse_is_not_set(config):
    for change, words in (
        ("policy=none", "must be one of"),
        ("policy=os:abort", "started with --policy"),
        ("polcy=x", "no live setting"),
    ):
        status, said = await config(change)
        assert (status, words in said, said.count("\n")) == (2, True, 0), said
    assert await config() == (0, "{}")


async def test_a_gateway_refuses_what_it_cannot_use_and_goes_on(site, reach, unique):
    site.start_worker("both-1")
    gateway = await site.gateway("--policy", "round_robin", num_workers=1)
    async with reach(gateway) as api:
        for content, words in (
            (b'{"polcy": 1}', "polcy"),
            (b'{"queue_limit": 0}', "queue_limit is 0"),
            (b'{"policy": "os:abort"}', "policy is 'os:abort'"),
        ):
            await put_config(Etcd(site.etcd), site.namespace, content)
            assert "event=config.refused" in await gateway.process.says(words)
            followed = await routing(api)
            assert (followed["policy"], followed["queue_limit"]) == ("round_robin", 4096)
            assert words in followed["refused_because"]
            assert await api.metric("headrace_config_refused") == 1
        assert (await api.chat(unique)).headers["x-headrace-policy"] == "round_robin"
        # A gateway that starts now reads the same key, and lives.
        async with reach(await site.gateway(num_workers=1)) as later:
            assert (await later.chat(unique)).status_code == 200
            assert "policy is 'os:abort'" in (await routing(later))["refused_because"]


async def test_explain_tells_whose_slo_a_request_had(site, reach, unique, until, config):
    site.start_worker("both-1")
    gateway = await site.gateway("--slo-ttft-s", "60", num_workers=1)
    async with reach(gateway) as api:

        async def kept(**fields):
            told = (await api.post("/v1/routes", json=api.body(unique, **fields))).json()
            return told["slo_ttft_s"], told["slo_ttft_from"], told["slo_itl_s"], told["slo_itl_from"]

        assert await kept() == (60.0, "gateway", None, "")
        assert (await config("models.sim.slo_itl_s=0.5", "models.sim.slo_ttft_s=50"))[0] == 0

        async def is_model():
            return await kept() == (50.0, "model", 0.5, "model")

        await until(is_model)
        assert await kept(slo_ttft_ms=40_000) == (40.0, "request", 0.5, "model")
