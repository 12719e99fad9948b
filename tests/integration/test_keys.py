"""What a gateway with a key file allows, and that it reads the file again without a restart."""

import asyncio
import signal

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


async def test_sighup_reads_the_keys_again_and_keeps_the_old_ones_if_they_are_broken(site, reach, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-old"\n')
    gateway = site.start_gateway("--api-keys-file", str(keys))
    await site.ready(gateway, 0)
    async with reach(gateway) as api:

        async def status(key):
            return (await api.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code

        assert (await status("sk-old"), await status("sk-new")) == (200, 401)
        keys.write_text("[[keys]]\n")
        gateway.process.send(signal.SIGHUP)
        assert "keys.toml" in await gateway.process.says("event=keys.refused")
        assert (await status("sk-old"), await status("sk-new")) == (200, 401)
        keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-new"\n')
        gateway.process.send(signal.SIGHUP)
        await gateway.process.says("event=keys.reloaded")
        assert (await status("sk-old"), await status("sk-new")) == (401, 200)


async def test_max_concurrent_counts_choices(site, reach, unique, until, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk"\nmax_concurrent = 2\nadmin = true\n')
    site.start_worker("both-1", speedup=1)
    gateway = await site.gateway("--api-keys-file", str(keys), num_workers=1)
    async with reach(gateway) as api:
        key = {"authorization": "Bearer sk"}
        refused = await api.chat(unique, n=3, headers=key)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        assert "'n' is 3" in refused.json()["error"]["message"]
        assert "retry-after" not in refused.headers
        asking = asyncio.create_task(api.chat(unique, n=2, max_tokens=10_000, headers=key))

        async def is_running():
            return await api.metric("headrace_requests_bound", headers=key) == 1

        await until(is_running)
        refused = await api.chat(unique, headers=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

        async def is_served():
            return (await api.chat(unique, n=2, max_tokens=1, headers=key)).status_code == 200

        await until(is_served)
