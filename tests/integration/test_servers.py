"""etcd and NATS as child processes."""

import asyncio
import sys
from pathlib import Path

import pytest

from app.cli.servers import ServerNotStarted, etcd_server, nats_server

pytestmark = pytest.mark.integration

SERVERS = {"etcd": etcd_server, "nats": nats_server}

PARENT = """
import asyncio, pathlib, sys
from app.cli.servers import {name}_server
async def main():
    async with {name}_server(pathlib.Path(sys.argv[1])) as server:
        print(server.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def is_gone(pid: int) -> None:
    while is_running(pid):  # noqa: ASYNC110 - the child of a killed parent has nobody who could set an event
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", SERVERS)
async def test_it_listens_while_the_block_runs_and_is_gone_after(name: str, tmp_path: Path) -> None:
    async with SERVERS[name](tmp_path / "data") as server:
        assert is_running(server.pid)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.close()
    assert not is_running(server.pid)


@pytest.mark.parametrize("name", SERVERS)
async def test_it_dies_with_a_killed_parent(name: str, tmp_path: Path) -> None:
    script = PARENT.format(name=name)
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path / "data"), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(60):
        await is_gone(pid)


@pytest.mark.parametrize("name", SERVERS)
async def test_a_taken_port_is_one_clear_error(name: str, tmp_path: Path) -> None:
    async with SERVERS[name](tmp_path / "first") as server:
        with pytest.raises(ServerNotStarted, match=f"{name} cannot listen on port {server.port}"):
            async with SERVERS[name](tmp_path / "second", server.port):
                pass


async def test_an_unusable_data_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerNotStarted, match="cannot be used"):
        async with etcd_server(tmp_path / "file" / "data"):
            pass
