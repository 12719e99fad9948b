"""etcd and NATS that ask for a password: it reaches them, and nobody else."""

import asyncio
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from app.cli.servers import etcd_server, free_port, nats_argv
from loadtest.processes import free_port as port_for_up
from tests.integration.conftest import PATIENCE_S
from tests.up import start_up

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SECRET = "s3cr3t@/x"
ENCODED = "s3cr3t%40%2Fx"


@asynccontextmanager
async def guarded_etcd(folder):
    """Its url, user and password included. Only root may do anything."""
    async with (
        etcd_server(folder / "etcd") as handle,
        httpx.AsyncClient(base_url=handle.url, timeout=PATIENCE_S) as api,
    ):
        for path, body in (
            ("user/add", {"name": "root", "password": SECRET}),
            ("role/add", {"name": "root"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("enable", {}),
        ):
            (await api.post(f"/v3/auth/{path}", json=body)).raise_for_status()
        yield handle.url.replace("//", f"//root:{ENCODED}@")


@asynccontextmanager
async def guarded_nats(folder):
    """Its url, user and password included, and the process."""
    port = free_port("nats", 0)
    argv = [*nats_argv(folder / "nats", port), "--user", "mill", "--pass", SECRET]
    process = await asyncio.create_subprocess_exec(*argv, stdout=-3, stderr=-3)
    try:
        yield f"nats://mill:{ENCODED}@127.0.0.1:{port}", process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def shown(text):
    return "s3cr3t" in text


async def test_passwords_reach_etcd_and_nats_and_stand_in_no_log(site, until, reach, tmp_path):
    async with guarded_etcd(tmp_path) as etcd, guarded_nats(tmp_path) as (nats, server):
        site.etcd, site.nats = etcd, nats
        await site.worker("both-0")
        gateway = await site.gateway(num_workers=1)
        async with reach(gateway) as api:
            assert (await api.chat("hello")).status_code == 200
            assert not shown((await api.get("/v1/fleet")).text)
        server.kill()
        for process in site.processes:
            await process.says("event=nats.unavailable")
        assert not any(shown(process.log.read_text()) for process in site.processes)


async def test_a_wrong_password_is_told_without_it(site, tmp_path):
    async with guarded_etcd(tmp_path) as etcd:
        site.etcd = etcd.replace(ENCODED, "s3cr3t-not")
        gateway = site.start_gateway()
        await gateway.process.says("event=etcd.unavailable")
        assert "authentication failed" in gateway.process.log.read_text()
        assert not shown(gateway.process.log.read_text())


async def test_up_shows_no_password_that_came_by_variable(until, tmp_path):
    def everything(group):
        """Command lines of what `headrace up` has started."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == group:
                    yield (folder / "cmdline").read_bytes().decode()
            except OSError:
                continue

    async with guarded_etcd(tmp_path) as etcd, guarded_nats(tmp_path) as (nats, _):
        output = tmp_path / "output"
        environment = {
            "HEADRACE_ETCD": etcd,
            "HEADRACE_NATS": nats,
            "HEADRACE_SPEEDUP": "10",
            "HEADRACE_CACHE_DIR": str(tmp_path / "assets"),
        }
        flags = ("--engine", "sim", "--state-dir", str(tmp_path / "state"))
        process = start_up(port_for_up(), output, *flags, env=environment)
        try:
            await until(lambda: "Headrace listens on" in output.read_text() or process.poll() is not None)
            commands = list(everything(process.pid))
            assert process.poll() is None, output.read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)
    assert len(commands) == 3
    texts = [output.read_text(), *commands, *(log.read_text() for log in (tmp_path / "state").glob("*.log"))]
    assert not any(shown(text) for text in texts)
