"""What both ends prove to each other before anything else, and what strangers get."""

import asyncio

import pytest

from planes.security.files import UnusableFile
from planes.security.planes import StreamSecurity
from planes.streams.client import WorkerConnection
from planes.streams.greeting import StreamKeys, gateway_proof, is_proof, worker_proof
from planes.streams.server import GatewayConnection, StreamServer
from planes.wire.frames import (
    Challenge,
    Delta,
    FromGateway,
    FromWorker,
    Hello,
    Introduction,
    Ping,
    Step,
    StreamId,
)
from tests.streams import LIMITS, REQUEST, WORKER, FakeHandler, FakeSink, FakeTransport, frame

TOKEN = b"a token that the whole fleet knows"


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "token"
    file.write_bytes(TOKEN + b"\n")
    return StreamKeys(StreamSecurity(token_file=file))


@pytest.fixture
async def worker(keys):
    """A worker's end that has just been connected to: the connection, its transport, what its handler hears."""
    handler, transport = FakeHandler(), FakeTransport()
    connection = GatewayConnection(StreamServer(handler, worker=WORKER, epoch=7, limits=LIMITS, keys=keys))
    connection.connection_made(transport)
    yield connection, transport, handler
    connection.connection_lost(None)


@pytest.fixture
async def gateway():
    """A gateway's end, which knows the token, and its transport."""
    connection, transport = WorkerConnection(WORKER, 7, LIMITS, token=TOKEN), FakeTransport()
    connection.connection_made(transport)
    yield connection, transport
    connection.connection_lost(None)


def passed_on(transport, kind, connection):
    """What is in one end's transport, handed to the other end."""
    for message in transport.sent(kind):
        connection.data_received(frame(message))


async def test_who_knows_the_token_gets_through_and_it_never_travels(worker, gateway):
    seen = bytearray()
    for _ in range(2):
        seen += worker[1].written
        passed_on(worker[1], FromWorker, gateway[0])
        seen += gateway[1].written
        passed_on(gateway[1], FromGateway, worker[0])
    assert gateway[0].greeted.done()
    gateway[0].start(REQUEST, FakeSink())
    await asyncio.sleep(0)
    passed_on(gateway[1], FromGateway, worker[0])
    assert [type(heard).__name__ for heard in worker[2].heard] == ["Generate"]
    assert TOKEN not in seen
    assert worker[1].sent(FromWorker) == []


async def test_a_worker_says_nothing_of_itself_to_who_has_not_proved_the_token(worker):
    connection, transport, handler = worker
    (challenge,) = transport.sent(FromWorker)
    assert isinstance(challenge, Challenge)
    nonce = b"n" * 32
    connection.data_received(
        frame(Introduction(nonce, gateway_proof(b"?", of_worker=challenge.nonce, of_gateway=nonce)))
    )
    assert transport.is_closed
    connection.connection_lost(None)
    assert (bytes(transport.written), handler.heard) == (b"", [])


@pytest.mark.parametrize("first", [REQUEST, Ping()])
async def test_a_stranger_s_request_is_not_looked_at(worker, first):
    connection, transport, handler = worker
    connection.data_received(frame(first))
    assert transport.is_closed
    assert handler.heard == []


async def test_a_proof_cannot_be_used_on_another_connection_or_sent_back(worker, gateway):
    gateway[0].data_received(frame(Challenge(b"w" * 32)))
    (introduction,) = gateway[1].sent(FromGateway)
    assert introduction.proof == gateway_proof(TOKEN, of_worker=b"w" * 32, of_gateway=introduction.nonce)
    worker[0].data_received(frame(introduction))
    assert worker[1].is_closed
    back = worker_proof(TOKEN, of_worker=b"w" * 32, of_gateway=introduction.nonce, worker=WORKER, epoch=7)
    assert not is_proof(introduction.proof, back)
    gateway[0].data_received(frame(Hello(WORKER, 7, introduction.proof)))
    assert gateway[1].is_closed


@pytest.mark.parametrize("frames", [[Hello(WORKER, 7)], [Challenge(b"w" * 32), Hello(WORKER, 7, b"x" * 32)]])
async def test_a_worker_that_does_not_know_the_token_gets_no_request(gateway, frames):
    connection, transport = gateway
    for each in frames:
        connection.data_received(frame(each))
    assert transport.is_closed
    assert not connection.greeted.done()
    connection.connection_lost(None)
    assert "has not proved" in str(connection.greeted.exception())


async def test_a_proof_is_of_one_worker_and_one_epoch():
    proof = worker_proof(TOKEN, of_worker=b"w", of_gateway=b"g", worker="a", epoch=11)
    assert proof != worker_proof(TOKEN, of_worker=b"w", of_gateway=b"g", worker="a1", epoch=1)


async def test_a_gateway_without_a_token_says_what_is_missing(gateway):
    connection, transport = WorkerConnection(WORKER, 7, LIMITS), FakeTransport()
    connection.connection_made(transport)
    connection.data_received(frame(Challenge(b"w" * 32)))
    connection.connection_lost(None)
    assert "--stream-token-file" in str(connection.greeted.exception())


async def test_a_second_challenge_or_one_that_is_too_short_is_refused(gateway):
    for nonces in ([b"w" * 32, b"v" * 32], [b"short"]):
        connection, transport = WorkerConnection(WORKER, 7, LIMITS, token=TOKEN), FakeTransport()
        connection.connection_made(transport)
        for nonce in nonces:
            connection.data_received(frame(Challenge(nonce)))
        assert transport.is_closed
        connection.connection_lost(None)


@pytest.mark.parametrize("data", [(4097).to_bytes(4, "little"), b"\x00\x10\x00\x00" + bytes(4093)])
async def test_a_stranger_s_bytes_are_limited(worker, gateway, data):
    for connection, transport, *_ in (worker, gateway):
        transport.written.clear()
        connection.data_received(data)
        assert transport.is_closed
        assert not transport.written


async def test_a_stranger_s_bytes_are_counted_over_all_reads(worker):
    connection, transport, _ = worker
    connection.data_received((4096).to_bytes(4, "little"))
    for _ in range(4092):
        connection.data_received(b"\x00")
    assert not transport.is_closed
    connection.data_received(b"\x00")
    assert transport.is_closed


async def test_steps_of_a_worker_that_has_not_said_who_it_is_reach_nobody(gateway):
    connection, _ = gateway
    sink = FakeSink()
    stream = connection.start(REQUEST, sink)
    connection.data_received(frame(Step([Delta(StreamId(stream), b"x", [1])])))
    assert sink.news == []


@pytest.mark.parametrize("text", ["", "short\n", "              \n"])
def test_a_token_that_could_be_guessed_is_refused_and_not_shown(tmp_path, text):
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(UnusableFile, match="token: ") as refused:
        StreamKeys(StreamSecurity(token_file=file))
    assert "short" not in str(refused.value)
