"""Streams over real sockets: who gets through, and how much strangers can take."""

import asyncio
import contextlib
import inspect
import socket
import ssl
from pathlib import Path

import pytest
import uvloop

from app.cli.certs import CertsSettings, make_certs
from planes.security.planes import StreamSecurity
from planes.security.tls import TlsFiles
from planes.streams.client import WorkerConnection, WorkerUnreachable, greets
from planes.streams.greeting import StreamKeys
from planes.streams.protocol import StreamLimits
from planes.streams.server import StreamServer
from planes.wire.frames import Generate, Step
from tests.integration.conftest import poll_until
from tests.streams import DONE, REQUEST, WORKER, FakeHandler, FakeSink, frame

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def on_each_loop(test):
    """Run the test once on asyncio's loop and once on uvloop's, which gateways and workers use."""
    own = inspect.signature(test)
    added = inspect.Parameter("new_loop", inspect.Parameter.KEYWORD_ONLY)

    def run(*, new_loop, **fixtures):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(test(**fixtures))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    setattr(run, "__signature__", own.replace(parameters=[*own.parameters.values(), added]))  # noqa: B010
    setattr(run, "pytestmark", getattr(test, "pytestmark", []))  # noqa: B010
    return pytest.mark.parametrize(
        "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
    )(run)


def tls(certs):
    return TlsFiles(certs.ca, *certs.plane)


def both(certs):
    return StreamKeys(StreamSecurity(tls(certs), certs.token))


class Answering(FakeHandler):
    def generate(self, connection, request):
        super().generate(connection, request)
        connection.post(DONE)


class Served:
    """A worker's end that listens, and gateways' ends that are connected to it."""

    def __init__(self, keys, **limits):
        self.handler = Answering()
        self.server = StreamServer(self.handler, worker=WORKER, epoch=7, limits=StreamLimits(**limits), keys=keys)
        self.port = 0
        self._connections = []

    async def __aenter__(self):
        self.port = await self.server.listen("127.0.0.1", 0)
        return self

    async def __aexit__(self, *_):
        await self.server.stop()
        for connection in self._connections:
            connection.close()
            await connection.closed

    async def connected(self, keys=None):
        connection = await WorkerConnection.open(WORKER, 7, f"127.0.0.1:{self.port}", timeout_s=20.0, keys=keys)
        self._connections.append(connection)
        return connection


async def answered(connection):
    sink = FakeSink()
    connection.start(REQUEST, sink)
    await poll_until(lambda: sink.news)
    return sink.news


def num_sockets():
    found = 0
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(file.readlink()).startswith("socket:")
    return found


@on_each_loop
async def test_a_request_goes_over_mutual_tls_with_a_token(certs):
    async with Served(both(certs)) as served:
        connection = await served.connected(both(certs))
        assert await answered(connection) == [DONE]
        assert isinstance(served.handler.heard[0], Generate)
        connection.close()
        await connection.closed


def ways(certs, strangers, tmp_path):
    token = tmp_path / "token"
    token.write_text("another token, as long as it should be")
    return {
        "nothing": None,
        "no certificate": StreamKeys(StreamSecurity(token_file=certs.token)),
        "another CA's": StreamKeys(StreamSecurity(tls(strangers), certs.token)),
        "a server's": StreamKeys(StreamSecurity(TlsFiles(certs.ca, *certs.server), certs.token)),
        "no token": StreamKeys(StreamSecurity(tls(certs))),
        "another token": StreamKeys(StreamSecurity(tls(certs), token)),
    }


@on_each_loop
@pytest.mark.parametrize(
    "way", ["nothing", "no certificate", "another CA's", "a server's", "no token", "another token"]
)
async def test_who_lacks_something_gets_nothing_and_the_handler_hears_nothing(certs, strangers, tmp_path, way):
    async with Served(both(certs)) as served:
        with pytest.raises(WorkerUnreachable):
            await served.connected(ways(certs, strangers, tmp_path)[way])
        await poll_until(lambda: not served.server._strangers)
        assert (served.handler.heard, served.server.connections) == ([], set())
        assert await answered(await served.connected(both(certs))) == [DONE]


@on_each_loop
@pytest.mark.parametrize("way", ["nothing", "no certificate", "another CA's", "no token", "another token"])
async def test_a_worker_that_lacks_something_gets_no_request(certs, strangers, tmp_path, way):
    async with Served(ways(certs, strangers, tmp_path)[way]) as served:
        with pytest.raises(WorkerUnreachable):
            await served.connected(both(certs))
        assert [each for each in served.handler.heard if each != "gone"] == []


@on_each_loop
async def test_a_stranger_gets_no_byte_of_the_worker(certs):
    async with Served(StreamKeys(StreamSecurity(tls(certs)))) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(frame(REQUEST))
        got = await reader.read()
        assert (WORKER.encode() in got, served.handler.heard) == (False, [])
        writer.close()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(certs.ca)
        context.check_hostname = False
        refused = False
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context)
            got = await reader.read()
            writer.close()
        except (ssl.SSLError, ConnectionError):
            refused = True
        assert refused or got == b""
        assert served.handler.heard == []


@on_each_loop
@pytest.mark.parametrize("is_tls", [True, False])
async def test_a_stranger_that_says_nothing_is_let_go_in_time(certs, is_tls):
    keys = both(certs) if is_tls else StreamKeys(StreamSecurity(token_file=certs.token))
    async with Served(keys, greeting_s=0.05) as served:
        before = num_sockets()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        await reader.read()
        writer.close()
        await poll_until(lambda: not served.server._strangers and num_sockets() <= before)


@on_each_loop
@pytest.mark.parametrize("is_tls", [True, False])
async def test_strangers_are_bounded_and_keep_nobody_out(certs, is_tls):
    keys = both(certs) if is_tls else StreamKeys(StreamSecurity(token_file=certs.token))
    async with Served(keys, greeting_s=60.0, max_strangers=3) as served:
        before = num_sockets()
        crowd = []
        for _ in range(20):
            stranger = socket.create_connection(("127.0.0.1", served.port))
            stranger.setblocking(False)
            crowd.append(stranger)
            await poll_until(lambda: len(served.server._strangers) <= 3)
        assert await answered(await served.connected(keys)) == [DONE]
        await poll_until(lambda: num_sockets() <= before + 20 + 3 + 2)
        for stranger in crowd:
            stranger.close()


@on_each_loop
async def test_running_streams_stay_and_new_ones_use_the_renewed_set(tmp_path, strangers):
    certs = make_certs(tmp_path, CertsSettings())
    async with Served(both(certs)) as served:
        keys = both(certs)
        running = await served.connected(keys)
        certs.token.write_text("the next token, as long as it should be")
        for mine, theirs in zip((certs.ca, *certs.plane), (strangers.ca, *strangers.plane), strict=True):
            mine.write_bytes(theirs.read_bytes())
        assert await answered(running) == [DONE]
        assert await answered(await served.connected(keys)) == [DONE]
        with pytest.raises(WorkerUnreachable):
            await served.connected(both(strangers))  # their certificates, and not the token


@on_each_loop
async def test_a_worker_that_cannot_be_greeted_without_keys_is_with_them(certs):
    class Entry:
        worker, epoch, address = WORKER, 7, ""

    async with Served(both(certs)) as served:
        Entry.address = f"127.0.0.1:{served.port}"
        assert await greets(Entry, keys=both(certs))
        assert not await greets(Entry, timeout_s=5.0)


@on_each_loop
async def test_a_slow_reader_over_tls_is_cut_off_at_the_limit(certs):
    """What waits in the TLS layer counts, too."""
    limits = {"max_unsent_bytes": 1 << 20, "ping_s": 5.0, "dead_s": 60.0}
    async with Served(both(certs), **limits) as served:
        connection = await served.connected(both(certs))
        connection._transport.pause_reading()
        (theirs,) = await poll_until(lambda: list(served.server.connections))
        for _ in range(64):
            theirs._send(Step([], [DONE], []))
            theirs._write(frame(Step([], [], [])) + bytes(1 << 20))
        assert theirs._transport.is_closing()
        connection.close()
