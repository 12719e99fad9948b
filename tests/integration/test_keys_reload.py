"""The key file is read again on SIGHUP, without a restart."""

import signal

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]


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
