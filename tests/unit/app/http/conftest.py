import asyncio
from contextlib import asynccontextmanager

import pytest
import uvicorn
import uvloop
from starlette.requests import Request

from app.http.connection import ConnectionLimits, StreamingProtocol
from app.http.response import Streamed, StreamedResponse
from tests.raw_http import MAX_UNSENT


def pytest_asyncio_loop_factories(item):
    """Answers are written on uvloop's transports too, as in a gateway: they differ once they are closed."""
    factories = {"asyncio": asyncio.new_event_loop}
    return factories | {"uvloop": uvloop.new_event_loop} if item.path.stem == "test_response" else factories


class Recorder:
    """What the application under test saw."""

    def __init__(self):
        self.ended: asyncio.Queue[str] = asyncio.Queue()
        self.cut_off = 0
        self.refusals: list[str] = []
        self.produce = None

    def count_cut_off(self):
        self.cut_off += 1


@asynccontextmanager
async def served(app, state, **told):
    """What opens connections to a uvicorn of ours that serves `app`. told: more for `StreamingProtocol`."""
    config = uvicorn.Config(app, http=StreamingProtocol, ws="none", lifespan="off", log_config=None)
    config.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: StreamingProtocol(config, state, {}, **told), "127.0.0.1", 0
    )

    @asynccontextmanager
    async def connected():
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()

    yield connected
    server.close()
    for connection in list(state.connections):
        connection.transport.abort()
    while state.tasks:
        await asyncio.wait(state.tasks)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def limits():
    return ConnectionLimits()


@pytest.fixture
def server_state():
    """uvicorn's: the connections and tasks that there are."""
    return uvicorn.server.ServerState()


@pytest.fixture
async def connect(recorder, limits, server_state):
    """Connections to a uvicorn of ours that answers everything with `recorder.produce`."""

    async def produce(request: Request, response: StreamedResponse) -> None:
        try:
            await recorder.produce(request, response)
            recorder.ended.put_nowait("done")
        except asyncio.CancelledError:
            recorder.ended.put_nowait("cancelled")
            raise

    app = Streamed(produce, max_unsent_bytes=MAX_UNSENT, on_cut_off=recorder.count_cut_off)
    async with served(app, server_state, limits=limits, on_refused=recorder.refusals.append) as connected:
        yield connected
