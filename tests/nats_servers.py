"""NATS servers of a test's own, with whatever configuration."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.aio.client import Client

from app.cli.servers import nats_argv, tied_to_parent
from planes.events import EventPlane


@asynccontextmanager
async def own_nats(folder, config):
    """A server with this configuration; a line `JS` stands for its JetStream."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
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
        process.wait(10)


@asynccontextmanager
async def plane_to(url: str, namespace: str = "ns", *, is_waiting: bool = True) -> AsyncIterator[EventPlane]:
    plane = EventPlane(url, namespace)
    task = asyncio.create_task(plane.run())
    try:
        if is_waiting:
            await plane.wait_connected(60)
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
    reply = await client.request(f"$JS.API.{api}", json.dumps(body).encode() if body else b"", timeout=5)
    answer = json.loads(reply.data)
    assert "error" not in answer, answer
    return answer
