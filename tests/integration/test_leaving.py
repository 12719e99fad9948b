"""A gateway behind a load balancer is asked to end."""

import signal

import pytest

from tests.integration.conftest import Api, refuses

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


async def test_it_says_so_and_goes_on_until_the_delay_is_over_or_skipped(site, stack, reach, unique, until):
    site.start_worker("both-1", speedup=0.2)
    gateway = await site.gateway("--drain-delay-s", "3600", "--admin-port", "0", num_workers=1)
    line = await gateway.process.says("event=gateway.admin_listening")
    admin_url = "http://127.0.0.1:" + next(w for w in line.split() if w.startswith("at=")).removeprefix("at=")
    async with reach(gateway) as api, Api(admin_url) as admin:
        assert (await api.get("/health")).status_code == (await admin.get("/health")).status_code == 200
        gateway.process.send(signal.SIGTERM)
        assert "listens_for_s=3600" in await gateway.process.says("event=gateway.leaving")
        told = await api.get("/health")
        assert (told.status_code, told.json()) == (503, {"status": "leaving", "workers": 1})
        assert (await api.get("/live")).status_code == 200
        async with reach(gateway) as new, new.stream(unique, max_tokens=200) as stream:
            await stream.read(5)
            gateway.process.send(signal.SIGTERM)
            await until(lambda: refuses(gateway.url))
            assert (await admin.get("/health")).json()["status"] == "leaving"
            await stream.read()
            async with reach(stack.alone) as alone:
                assert stream.text == await alone.text(unique, max_tokens=200)
            assert stream.is_done
    assert await gateway.process.ended() == 0


async def test_the_delay_ends_by_itself(site):
    gateway = await site.gateway("--drain-delay-s", "0.2")
    gateway.process.send(signal.SIGTERM)
    assert await gateway.process.ended() == 0
    assert gateway.process.said("event=gateway.leaving")
    assert gateway.process.said("event=gateway.stopped")


async def test_a_third_signal_ends_what_is_left(site, reach, unique, until):
    site.start_worker("both-1", speedup=1)
    gateway = await site.gateway("--drain-delay-s", "3600", num_workers=1)
    async with reach(gateway) as api, api.stream(unique, max_tokens=20_000) as stream:
        await stream.read(5)
        gateway.process.send(signal.SIGTERM)
        await gateway.process.says("event=gateway.leaving")
        gateway.process.send(signal.SIGTERM)
        await until(lambda: refuses(gateway.url))
        gateway.process.send(signal.SIGTERM)
        await stream.read()
        assert stream.error["code"] == "gateway_stopping"
    assert await gateway.process.ended() == 0
