"""Gateway's and worker's ends of a stream over real sockets."""

import asyncio
import socket

import pytest
import uvloop

from planes.streams.client import WorkerConnection, WorkerUnreachable
from planes.streams.protocol import StreamLimits
from planes.streams.server import StreamServer
from planes.wire.frames import Delta, Done, FinishReason, Format, Generate, Sampling, StreamId, Usage
from planes.wire.messages import RequestId, WorkerId

pytestmark = pytest.mark.integration

WORKER = WorkerId("d0")


class Echo:
    """Answers each prompt with its bytes, one Delta, then Done."""

    def __init__(self):
        self.is_gone = asyncio.Event()

    def generate(self, connection, request):
        connection.post(Delta(request.stream, request.prompt, [1]))
        connection.post(Done(request.stream, FinishReason.STOP, Usage(1, 1, 0)))

    def cancel(self, connection, stream): ...

    def release(self, connection, request): ...

    def gone(self, connection):
        self.is_gone.set()


class Collect:
    def __init__(self):
        self.payloads = []
        self.ended = asyncio.get_running_loop().create_future()

    def on_delta(self, payload, tokens):
        self.payloads.append(payload)

    def on_done(self, done):
        self.ended.set_result("done")

    def on_failed(self, failed):
        self.ended.set_result(failed)

    def on_lost(self, error):
        self.ended.set_result(str(error))


def generate(prompt: bytes) -> Generate:
    return Generate(StreamId(0), RequestId("r"), prompt, Sampling(max_tokens=1), Format("chat", "i", "m", 0))


PATIENCE_S = 60.0


@pytest.fixture
async def served():
    handler = Echo()
    server = StreamServer(handler, worker=WORKER, epoch=7, limits=StreamLimits(ping_s=0.05, dead_s=0.2))
    port = await server.listen("127.0.0.1", 0)
    yield handler, server, f"127.0.0.1:{port}"
    await server.stop()


async def exchange_many() -> None:
    handler = Echo()
    server = StreamServer(handler, worker=WORKER, epoch=7)
    address = f"127.0.0.1:{await server.listen('127.0.0.1', 0)}"
    connection = await WorkerConnection.open(WORKER, 7, address, timeout_s=PATIENCE_S)
    sinks = [Collect() for _ in range(50)]
    prompts = [bytes([i]) * (i * 20_000) for i in range(50)]
    for sink, prompt in zip(sinks, prompts, strict=True):
        connection.start(generate(prompt), sink)
    async with asyncio.timeout(60):
        assert [await sink.ended for sink in sinks] == ["done"] * 50
    assert [sink.payloads for sink in sinks] == [[prompt] for prompt in prompts]
    connection.close()
    await asyncio.wait_for(handler.is_gone.wait(), 60)
    await server.stop()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_many_requests_share_one_connection_and_prompts_may_be_long(new_loop):
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(exchange_many())


async def test_a_stopped_server_ends_the_streams(served):
    _, server, address = served
    connection = await WorkerConnection.open(WORKER, 7, address, timeout_s=PATIENCE_S)
    await server.stop()
    await asyncio.wait_for(connection.closed, 60)


async def test_a_worker_that_hangs_is_found_dead_though_its_socket_is_open():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(WorkerUnreachable, match=r"within 0\.1 s"):
            await WorkerConnection.open(WORKER, 7, address, timeout_s=0.1)


async def test_nobody_there_is_said_so(served):
    _, server, address = served
    await server.stop()
    with pytest.raises(WorkerUnreachable, match=address):
        await WorkerConnection.open(WORKER, 7, address, timeout_s=PATIENCE_S)
    with pytest.raises(WorkerUnreachable, match="invalid literal"):
        await WorkerConnection.open(WORKER, 7, "127.0.0.1:port", timeout_s=PATIENCE_S)


async def test_a_foreign_epoch_at_the_address_is_refused(served):
    _, _, address = served
    with pytest.raises(WorkerUnreachable, match="d0 of epoch 7 answers there; wanted d0 of epoch 6"):
        await WorkerConnection.open(WORKER, 6, address, timeout_s=PATIENCE_S)


async def test_heartbeats_keep_a_quiet_connection_alive(served):
    handler, _, address = served
    limits = StreamLimits(ping_s=0.05, dead_s=2.0)
    connection = await WorkerConnection.open(WORKER, 7, address, timeout_s=PATIENCE_S, limits=limits)
    heard = connection.num_bytes_received
    await asyncio.sleep(2 * limits.dead_s)
    assert connection.num_bytes_received > heard
    assert not connection.closed.done()
    assert not handler.is_gone.is_set()
    connection.close()
