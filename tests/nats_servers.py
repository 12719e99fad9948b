"""NATS servers of a test's own, with whatever configuration."""

import asyncio
import contextlib
import json
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.aio.client import Client

from app.cli.servers import free_port, nats_argv, tied_to_parent
from planes.events import EventPlane
from tests.integration.conftest import PATIENCE_S


@asynccontextmanager
async def own_nats(folder, config):
    """A server with this configuration; a line `JS` stands for its JetStream."""
    port = free_port("nats", 0)
    folder.mkdir(exist_ok=True)
    (folder / "nats.conf").write_text(re.sub("(?m)^JS$", f'jetstream {{ store_dir: "{folder}/js" }}', config))
    server = nats_argv(folder, port)[0]
    argv = tied_to_parent([server, "-c", str(folder / "nats.conf"), "-a", "127.0.0.1", "-p", str(port)])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)  # noqa: ASYNC220 - it forks, and is there
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@asynccontextmanager
async def plane_to(url: str, namespace: str = "ns", *, is_waiting: bool = True) -> AsyncIterator[EventPlane]:
    plane = EventPlane(url, namespace)
    task = asyncio.create_task(plane.run())
    try:
        if is_waiting:
            await plane.wait_connected(PATIENCE_S)
        yield plane
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def client_of(url):
    client = Client()
    await client.connect(url)
    try:
        yield client
    finally:
        await client.close()


async def call(client, api, body=None):
    asked = json.dumps(body).encode() if body else b""
    reply = await client.request(f"$JS.API.{api}", asked, timeout=PATIENCE_S)
    answer = json.loads(reply.data)
    assert "error" not in answer, answer
    return answer
