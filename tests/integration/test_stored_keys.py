"""API keys in etcd: made, rotated and revoked from the command line, and followed by every gateway at once."""

import asyncio
import os
import subprocess
import sys

import pytest

from app.cli.servers import etcd_server
from tests.integration.conftest import ROOT, Site

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
def headrace(site):
    """Runs `headrace keys …` and gives what it says: its standard output."""

    async def run(*arguments, status=0):
        argv = [sys.executable, "-m", "app.cli", "keys", *arguments, "--etcd", site.etcd, "--namespace", site.namespace]
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
        )
        said, errors = await process.communicate()
        assert process.returncode == status, errors.decode()
        return said.decode().strip() if not status else errors.decode()

    return run


def statuses(*apis):
    """For a secret: how each gateway answers whoever has it."""

    async def asked(secret):
        headers = {"authorization": f"Bearer {secret}"}
        return [(await api.get("/v1/models", headers=headers)).status_code for api in apis]

    return asked


async def test_keys_are_followed_by_every_gateway_at_once(site, reach, headrace, until):
    gateways = [site.start_gateway("--api-keys") for _ in range(2)]
    for gateway in gateways:
        await site.ready(gateway, 0)
        await gateway.process.says("event=keys.known")
    async with reach(gateways[0]) as one, reach(gateways[1]) as other:
        status = statuses(one, other)
        assert await status("sk-hr-none") == [401, 401]
        secret = await headrace("create", "search", "--tokens-per-minute", "1000")
        name = (await headrace("list")).splitlines()[1].split()[0]

        async def answer(secret, wanted):
            return await status(secret) == [wanted, wanted]

        await until(lambda: answer(secret, 200))
        renewed = await headrace("rotate", name, "--grace-s", "3600")
        await until(lambda: answer(renewed, 200))
        assert await status(secret) == [200, 200], "within the grace period"
        last = await headrace("rotate", name, "--grace-s", "0")
        await until(lambda: answer(secret, 401))
        assert await status(renewed) == [401, 401]
        assert await status(last) == [200, 200]
        await headrace("revoke", name)
        await until(lambda: answer(last, 401))
        assert "there is no key" in await headrace("revoke", name, status=2)
    logs = "".join(gateway.process.log.read_text() for gateway in gateways)
    assert not any(each in logs for each in (secret, renewed, last))


async def test_a_key_may_use_its_models_and_no_others_are_told_of(site, reach, headrace, until):
    await site.worker("both-1", "--served-model-name", "open", speedup=100)
    await site.worker("both-2", "--served-model-name", "secret", speedup=100)
    gateway = await site.gateway("--api-keys", num_workers=2)
    key = {"authorization": f"Bearer {await headrace('create', 't', '--models', 'open')}"}
    async with reach(gateway) as api:

        async def is_served():
            return (await api.chat("hello", model="open", headers=key)).status_code == 200

        await until(is_served)
        assert [each["id"] for each in (await api.get("/v1/models", headers=key)).json()["data"]] == ["open"]
        unknown = await api.chat("hello", model="nothing", headers=key)
        assert unknown.status_code == 404
        for path, body in (
            ("/v1/chat/completions", api.body("hello", model="secret")),
            ("/v1/completions", {"model": "secret", "prompt": "hello"}),
            ("/v1/responses", {"model": "secret", "input": "hello"}),
            ("/v1/responses/input_tokens", {"model": "secret", "input": "hello"}),
            ("/v1/messages", api.body("hello", model="secret")),
            ("/v1/messages/count_tokens", api.body("hello", model="secret")),
            ("/v1/embeddings", {"model": "secret", "input": "hello"}),
            ("/v1/routes", api.body("hello", model="secret")),
            ("/tokenize", {"model": "secret", "prompt": "hello"}),
            ("/detokenize", {"model": "secret", "tokens": [1]}),
        ):
            refused = await api.post(path, json=body, headers=key)
            assert refused.status_code == 404, (path, refused.text)
        assert (await api.get("/v1/models/secret", headers=key)).status_code == 404
        told = await api.post("/tokenize", json={"prompt": "hello"}, headers=key)
        assert told.status_code == 200, "the only model that there is, for this key"
        told = await api.post("/v1/embeddings", json={"model": "open", "input": "hello"}, headers=key)
        assert "secret" not in told.text


async def test_known_keys_work_on_while_etcd_is_away_and_a_new_gateway_says_that_it_knows_none(
    nats_url, tmp_path, reach, until
):
    async with etcd_server(tmp_path / "data") as server:
        url = server.url
        site = Site(url, nats_url, tmp_path)
        gateway = await site.gateway("--api-keys")
        await gateway.process.says("event=keys.known")
        argv = [sys.executable, "-m", "app.cli", "keys", "create", "t", "--etcd", url, "--namespace", site.namespace]
        made = await asyncio.to_thread(subprocess.run, argv, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        secret = made.stdout.decode().strip()
        async with reach(gateway) as api:
            status = statuses(api)

            async def is_known():
                return await status(secret) == [200]

            await until(is_known)
    try:
        async with reach(gateway) as api:
            await gateway.process.says("event=etcd.unavailable")
            assert await statuses(api)(secret) == [200]
            assert await statuses(api)("sk-hr-other") == [401]
        fresh = await site.gateway("--api-keys")
        async with reach(fresh) as api:
            refused = await api.get("/v1/models", headers={"authorization": f"Bearer {secret}"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "keys_unknown")
            assert refused.headers["retry-after"] == "1"
    finally:
        site.close()


async def test_a_file_and_etcd_go_together(site, reach, headrace, until, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-file"\n')
    gateway = await site.gateway("--api-keys", "--api-keys-file", str(keys))
    secret = await headrace("create", "t")
    async with reach(gateway) as api:
        status = statuses(api)

        async def both_work():
            return await status(secret) == await status("sk-file") == [200]

        await until(both_work)
