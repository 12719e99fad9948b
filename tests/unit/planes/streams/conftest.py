import pytest

from planes.streams.client import WorkerConnection
from planes.streams.server import GatewayConnection, StreamServer
from planes.wire.frames import FromWorker, Hello
from tests.streams import LIMITS, WORKER, FakeHandler, FakeTransport, frame


@pytest.fixture
async def worker_side():
    """The gateway's end: a WorkerConnection on a fake transport."""
    connection, transport = WorkerConnection(WORKER, 7, LIMITS), FakeTransport()
    connection.connection_made(transport)
    connection.data_received(frame(Hello(WORKER, 7)))
    yield connection, transport
    connection.connection_lost(None)


@pytest.fixture
async def gateway_side():
    """The worker's end: a GatewayConnection on a fake transport, its Hello already sent."""
    handler = FakeHandler()
    connection, transport = (
        GatewayConnection(StreamServer(handler, worker=WORKER, epoch=7, limits=LIMITS)),
        FakeTransport(),
    )
    connection.connection_made(transport)
    assert transport.sent(FromWorker) == [Hello(WORKER, 7)]
    yield connection, transport, handler
    connection.connection_lost(None)
