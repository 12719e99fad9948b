"""A gateway process in front of workers whose answers the test writes by hand: what goes wrong, and what must not."""

import asyncio
import json
import signal
import socket
import time
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from planes.assets import make_card, publish_card, read_model_files
from planes.control import Etcd, Registrar
from planes.events import EventPlane
from planes.objects import ObjectStore
from planes.streams.client import greets
from planes.streams.protocol import StreamLimits
from planes.streams.server import StreamServer
from planes.wire.frames import Delta, Done, Failed, FailureKind, FinishReason, Generate, Usage, unpack_tokens
from planes.wire.messages import EngineFacts, Registration, Role, WorkerId, WorkerState
from tests.integration.conftest import PATIENCE_S

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FILES = read_model_files(Path(__file__).parents[2] / "workers" / "sim" / "model")
FACTS = EngineFacts(16, 1000, 4096, 8, 2048, 1000, 300)
END = b"data: [DONE]\n\n"
PATIENT = StreamLimits(ping_s=0.2, dead_s=30.0)
"""A gateway that a busy machine does not let run for a while is not dead."""


def event(number: int) -> bytes:
    return b'data: {"token":%d}\n\n' % number


class ScriptedWorker:
    """Registered and connected like any worker; `requests` are what came, and the test answers them."""

    def __init__(self, name: str) -> None:
        self.name = WorkerId(name)
        self.epoch = time.time_ns()
        self.requests: asyncio.Queue[tuple[object, Generate]] = asyncio.Queue()
        self.cancelled: asyncio.Queue[int] = asyncio.Queue()
        self.server = StreamServer(self, worker=self.name, epoch=self.epoch, limits=PATIENT)
        self.registrar: Registrar
        self.registration: Registration
        self.port: int

    def generate(self, connection, request):
        self.requests.put_nowait((connection, request))

    def cancel(self, connection, stream):
        self.cancelled.put_nowait(stream)

    def release(self, connection, request): ...

    def gone(self, connection): ...

    async def next_request(self):
        return await asyncio.wait_for(self.requests.get(), PATIENCE_S)

    def drop_connections(self):
        for connection in list(self.server.connections):
            connection._transport.abort()


def say(connection, request, *numbers):
    for number in numbers:
        connection.post(Delta(request.stream, event(number), [number]))


def finish(connection, request, payload=END):
    connection.post(Done(request.stream, FinishReason.STOP, Usage(5, 3, 0), payload))


@pytest.fixture
async def crew(site):
    """Starts scripted workers in the site's namespace."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        events = EventPlane(site.nats, site.namespace)
        running = [tasks.create_task(events.run())]
        await events.wait_connected(PATIENCE_S)
        card = make_card(FILES, model="sim", block_size=16)
        digest = await publish_card(ObjectStore(events), card, FILES)

        async def start(name: str, *, port: int = 0, epoch: int = 0, state=WorkerState.READY) -> ScriptedWorker:
            worker = ScriptedWorker(name)
            bound = port or await worker.server.listen("127.0.0.1", 0)
            stack.push_async_callback(worker.server.stop)
            address = f"127.0.0.1:{bound}"
            worker.registration = Registration(
                worker.name, epoch or worker.epoch, Role.BOTH, "sim", address, "sim", FACTS, digest, state=state
            )
            worker.registrar = Registrar(Etcd(site.etcd), site.namespace, worker.registration, is_running=greets)
            running.append(tasks.create_task(worker.registrar.run()))
            worker.port = bound
            return worker

        yield start
        for task in running:
            task.cancel()


class RawClient:
    """One HTTP/1.1 connection, byte by byte."""

    def __init__(self, url: str) -> None:
        self.port = int(url.rsplit(":", 1)[1])

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_):
        self.writer.close()

    def chat(self, *, stream=True, **fields):
        messages = [{"role": "user", "content": "hello"}]
        body = json.dumps({"model": "sim", "messages": messages, "stream": stream, "temperature": 0, **fields})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write((head + body).encode())

    async def head(self):
        status, *lines = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)).decode().split("\r\n")
        return int(status.split()[1]), dict(line.split(": ", 1) for line in lines if line)

    async def chunk(self):
        """The next chunk; empty at the end of the answer."""
        size = int(await asyncio.wait_for(self.reader.readline(), PATIENCE_S), 16)
        return (await asyncio.wait_for(self.reader.readexactly(size + 2), PATIENCE_S))[:-2]

    async def rest(self):
        chunks = []
        while chunk := await self.chunk():
            chunks.append(chunk)
        return b"".join(chunks)

    async def whole(self):
        status, headers = await self.head()
        return status, await self.reader.readexactly(int(headers["content-length"]))


async def test_payloads_arrive_verbatim_and_the_connection_serves_again(site, crew):
    worker = await crew("w1")
    gateway = await site.gateway(num_workers=1)
    async with RawClient(gateway.url) as client:
        for _ in range(2):
            client.chat()
            connection, request = await worker.next_request()
            say(connection, request, 1)
            assert (await client.head())[1]["x-headrace-decode"] == "w1"
            assert await client.chunk() == event(1)
            say(connection, request, 2, 3)
            finish(connection, request)
            assert await client.rest() == event(2) + event(3) + END
        client.chat(stream=False)
        connection, request = await worker.next_request()
        finish(connection, request, b'{"whole": true}')
        assert await client.whole() == (200, b'{"whole": true}')


async def test_a_stream_whose_worker_drops_goes_on_where_it_was(site, crew):
    workers = {name: await crew(name) for name in ("w1", "w2")}
    gateway = await site.gateway(num_workers=2)
    async with RawClient(gateway.url) as client:
        client.chat()
        first = await _who_got_it(workers)
        worker, connection, request = first
        say(connection, request, 1, 2)
        await client.head()
        assert await client.chunk() + await client.chunk() == event(1) + event(2)
        worker.drop_connections()
        other, connection, request = await _who_got_it(workers)
        assert other is not worker
        assert unpack_tokens(request.resume) == [1, 2]
        say(connection, request, 3)
        finish(connection, request)
        assert await client.rest() == event(3) + END


async def _who_got_it(workers):
    """The worker that got the next request, its connection and the request."""
    waiting = {asyncio.ensure_future(worker.requests.get()): worker for worker in workers.values()}
    done, pending = await asyncio.wait(waiting, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    (task,) = done
    return waiting[task], *task.result()


async def test_a_worker_that_hangs_is_given_up_within_the_heartbeat(site, crew, until):
    worker = await crew("w1")
    flags = ("--heartbeat-s", "0.1", "--dead-after-s", "0.3", "--replacement-s", "0")
    gateway = await site.gateway(*flags, num_workers=1)
    async with RawClient(gateway.url) as client:
        client.chat()
        connection, request = await worker.next_request()
        say(connection, request, 1)
        await client.head()
        assert await client.chunk() == event(1)
        for peer in worker.server.connections:  # alive, but neither hears nor says anything
            peer._transport.pause_reading()
            peer._timer.cancel()
        assert b'"code":"no_worker"' in await client.rest()
    await until(lambda: gateway.process.said("silent for 0.3 s"))


async def test_a_gone_client_s_request_is_cancelled_on_its_worker(site, crew):
    worker = await crew("w1")
    gateway = await site.gateway(num_workers=1)
    async with RawClient(gateway.url) as client:
        client.chat()
        _, request = await worker.next_request()
    assert await asyncio.wait_for(worker.cancelled.get(), PATIENCE_S) == request.stream


async def test_a_client_that_does_not_read_is_cut_off_and_counted(site, crew, reach, until):
    worker = await crew("w1")
    gateway = await site.gateway("--slow-client-bytes", "1000000", num_workers=1)
    async with RawClient(gateway.url) as client:
        client.writer.transport.pause_reading()
        client.chat()
        connection, request = await worker.next_request()
        for _ in range(300):  # more than the limit and what sockets hold, less than a worker may keep for a gateway
            connection.post(Delta(request.stream, b"x" * 100_000, [1]))
            await asyncio.sleep(0)  # a frame each
        assert await asyncio.wait_for(worker.cancelled.get(), PATIENCE_S) == request.stream
    async with reach(gateway) as api:
        assert await api.metric("headrace_clients_cut_off_total") == 1


async def test_what_a_worker_finds_invalid_is_not_put_down_to_the_client(site, crew):
    worker = await crew("w1")
    gateway = await site.gateway(num_workers=1)
    async with RawClient(gateway.url) as client:
        client.chat()
        connection, request = await worker.next_request()
        connection.post(Failed(request.stream, FailureKind.INVALID, "context_length_exceeded", "too long", "messages"))
        status, body = await client.whole()
        error = json.loads(body)["error"]
        assert (status, error["code"], error["type"]) == (502, "worker_disagrees", "server_error")


async def test_a_draining_worker_gets_nothing_new(site, crew, until, reach):
    workers = {name: await crew(name) for name in ("w1", "w2")}
    gateway = await site.gateway(num_workers=2)
    draining = msgspec.structs.replace(workers["w1"].registration, state=WorkerState.DRAINING)
    workers["w1"].registrar.update(draining)
    async with reach(gateway) as api:

        async def is_seen():
            return (await api.fleet())["w1"]["state"] == "draining"

        await until(is_seen)
    async with RawClient(gateway.url) as client:
        for _ in range(4):
            client.chat(stream=False)
            connection, request = await workers["w2"].next_request()
            finish(connection, request, b"{}")
            assert (await client.whole())[0] == 200


async def test_a_foreign_worker_at_a_registered_address_is_not_used(site, crew, until):
    worker = await crew("w1")
    await crew("ghost", port=worker.port)
    gateway = await site.gateway(num_workers=1)
    await until(lambda: gateway.process.said("w1 of epoch"))
    async with RawClient(gateway.url) as client:
        client.chat(stream=False)
        connection, request = await worker.next_request()
        finish(connection, request, b"{}")
        status, headers = await client.head()
        assert (status, headers["x-headrace-decode"]) == (200, "w1")


async def test_a_huge_body_is_refused_before_it_is_sent(site):
    gateway = await site.gateway()
    async with RawClient(gateway.url) as client:
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        status, body = await client.whole()
        assert status == 413
        assert b"100000000 bytes" in body
        assert b"the limit is 16777216" in body


async def test_without_workers_nothing_is_pretended(site, reach):
    gateway = await site.gateway()
    async with reach(gateway) as api:
        assert (await api.get("/health")).status_code == 503
        assert (await api.get("/live")).status_code == 200
        assert (await api.get("/v1/models")).json() == {"object": "list", "data": []}
        refusal = await api.chat("hello")
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "no_worker")
        for response, status in ((await api.get("/nowhere"), 404), (await api.get("/v1/completions"), 405)):
            assert (response.status_code, response.json()["error"]["type"]) == (status, "invalid_request_error")


async def is_refused(port):
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_sigterm_lets_running_answers_end_and_takes_no_new_ones(site, crew, until):
    worker = await crew("w1")
    gateway = await site.gateway(num_workers=1)
    async with RawClient(gateway.url) as client:
        client.chat()
        connection, request = await worker.next_request()
        say(connection, request, 1)
        await client.head()
        gateway.process.send(signal.SIGTERM)
        await until(lambda: is_refused(client.port))
        say(connection, request, 2)
        finish(connection, request)
        assert await client.rest() == event(1) + event(2) + END
    assert await gateway.process.ended() == 0


async def test_answers_that_outlast_the_drain_are_told(site, crew):
    worker = await crew("w1")
    gateway = await site.gateway("--drain-s", "1", num_workers=1)
    async with RawClient(gateway.url) as client:
        client.chat()
        connection, request = await worker.next_request()
        say(connection, request, 1)
        await client.head()
        gateway.process.send(signal.SIGTERM)
        assert b'"code":"gateway_stopping"' in await client.rest()
    assert await gateway.process.ended() == 0


async def test_a_taken_port_is_one_clear_line(site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = site.start("gateway", ["app.cli", "gateway", "--port", str(taken.getsockname()[1]), *site.flags])
        assert await process.ended() == 2
    assert "--port is" in process.log.read_text()
    assert len(process.log.read_text().splitlines()) == 1


async def test_head_says_what_get_says_without_a_body(site):
    gateway = await site.gateway()
    async with RawClient(gateway.url) as client:
        for path, status in (("/health", 503), ("/live", 200), ("/live", 200)):
            client.writer.write(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert (await client.head())[0] == status, "whatever followed the last head was no body"
