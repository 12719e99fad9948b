"""The HTTP side of a gateway, which each folder builds its own way (`gateway`)."""

import asyncio
from typing import Any

import httpx
import pytest
import uvicorn

from app.http.server import server_config
from app.main import create_app, streamed_routes, streams_first
from tests.raw_http import until


@pytest.fixture
async def client(gateway):
    """Asks the application, without a connection."""
    transport = httpx.ASGITransport(create_app(gateway), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.fixture
async def served():
    """Serves a gateway as `headrace gateway` does.  Returns: a function from a gateway to its address."""
    running = []

    async def start(gateway):
        app = create_app(gateway)
        at_once = {path: route.begin for path, route in streamed_routes(app).items()}
        config = server_config(gateway.settings, streams_first(app), gateway.metrics, at_once=at_once)
        config.load()
        protocol: Any = config.http_protocol_class
        state, loop = uvicorn.server.ServerState(), asyncio.get_running_loop()
        server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
        running.append((server, state))
        return server.sockets[0].getsockname()

    yield start
    for server, state in running:
        server.close()
        await until(lambda state=state: not state.connections and not state.tasks)
