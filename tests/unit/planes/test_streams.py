import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from planes.streams import (
    FrameBuffer,
    GatewayConnection,
    ProtocolError,
    StreamLimits,
    StreamServer,
    WorkerConnection,
    WorkerLost,
    WorkerUnreachable,
)
from planes.wire.frames import (
    Cancel,
    Delta,
    Done,
    Failed,
    FailureKind,
    FinishReason,
    Format,
    FromGateway,
    FromWorker,
    Generate,
    Hello,
    Ping,
    Pong,
    Release,
    Sampling,
    Step,
    StreamId,
    Usage,
)
from planes.wire.messages import RequestId, WorkerId

WORKER = WorkerId("d0")
LIMITS = StreamLimits(ping_s=1.0, dead_s=3.0, max_frame_bytes=4096, max_unsent_bytes=10_000)
REQUEST = Generate(StreamId(0), RequestId("r"), b"", Sampling(max_tokens=1), Format("chat", "id", "m", 0))
DONE = Done(StreamId(1), FinishReason.STOP, Usage(1, 1, 0))


def frame(message) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(4, "little") + payload


class FakeTransport(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.written = bytearray()
        self.num_writes = 0
        self.unsent = 0
        self.is_closed = False

    def write(self, data):
        self.written += data
        self.num_writes += 1

    def get_write_buffer_size(self):
        return self.unsent

    def is_closing(self):
        return self.is_closed

    def close(self):
        self.is_closed = True

    abort = close

    def sent(self, kind):
        frames = FrameBuffer(1 << 20).feed(bytes(self.written))
        self.written.clear()
        return [msgspec.msgpack.decode(frame, type=kind) for frame in frames]


class FakeSink:
    def __init__(self):
        self.news = []

    def on_delta(self, payload, tokens):
        self.news.append((payload, tokens))

    def on_done(self, done):
        self.news.append(done)

    def on_failed(self, failed):
        self.news.append(failed)

    def on_lost(self, error):
        self.news.append(error)


class FakeHandler:
    def __init__(self):
        self.heard = []

    def generate(self, connection, request):
        self.heard.append(request)

    def cancel(self, connection, stream):
        self.heard.append(stream)

    def release(self, connection, request):
        self.heard.append(request)

    def gone(self, connection):
        self.heard.append("gone")


@pytest.fixture
async def worker_side():
    """The gateway's end: a WorkerConnection on a fake transport."""
    connection, transport = WorkerConnection(WORKER, 7, LIMITS), FakeTransport()
    connection.connection_made(transport)
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


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_frames_split_anywhere_are_the_same_frames(payloads, data):
    stream = b"".join(len(payload).to_bytes(4, "little") + payload for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    frames = FrameBuffer(1000)
    got = [
        bytes(frame)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for frame in frames.feed(stream[start:end])
    ]
    assert got == payloads


def test_frames_split_at_every_byte_decode_equally():
    step = Step([Delta(StreamId(3), b"data: {}\n\n", [1, 2])], [DONE])
    stream, frames = frame(step) + frame(Pong()), FrameBuffer(1000)
    got = [f for at in range(len(stream)) for f in frames.feed(stream[at : at + 1])]
    assert [msgspec.msgpack.decode(f, type=FromWorker) for f in got] == [step, Pong()]


def test_an_announced_frame_beyond_the_limit_is_refused_before_it_arrives():
    with pytest.raises(ProtocolError, match="101 bytes; the limit is 100"):
        FrameBuffer(100).feed((101).to_bytes(4, "little"))


@pytest.mark.parametrize(("ping_s", "dead_s"), [(0.0, 3.0), (3.0, 3.0), (-1.0, 2.0)])
def test_a_heartbeat_that_cannot_work_is_refused(ping_s, dead_s):
    with pytest.raises(ValueError, match="0 < ping_s < dead_s"):
        StreamLimits(ping_s=ping_s, dead_s=dead_s)


async def test_a_step_reaches_each_request_s_sink(worker_side):
    connection, transport = worker_side
    first, second = FakeSink(), FakeSink()
    assert (connection.start(REQUEST, first), connection.start(REQUEST, second)) == (1, 2)
    await asyncio.sleep(0)
    assert [request.stream for request in transport.sent(FromGateway)] == [1, 2]
    failed = Failed(StreamId(2), FailureKind.INTERRUPTED, "engine", "broke")
    connection.data_received(
        frame(Step([Delta(StreamId(2), b"b", [5]), Delta(StreamId(1), b"a", [4])], [DONE], [failed]))
    )
    assert first.news == [(b"a", [4]), DONE]
    assert second.news == [(b"b", [5]), failed]
    assert connection.num_streams == 0


async def test_steps_of_one_read_reach_each_sink_as_one(worker_side):
    connection, transport = worker_side
    first, second = FakeSink(), FakeSink()
    connection.start(REQUEST, first)
    connection.start(REQUEST, second)
    one = Step([Delta(StreamId(1), b"a", [1]), Delta(StreamId(2), b"x", [9])])
    two = Step([Delta(StreamId(1), b"b", [2, 3])])
    three = Step([Delta(StreamId(1), b"", [4])], [DONE])
    await asyncio.sleep(0)
    transport.sent(FromGateway)
    connection.data_received(frame(one) + frame(two) + frame(Ping()) + frame(three))
    assert first.news == [(b"ab", [1, 2, 3, 4]), DONE]
    assert second.news == [(b"x", [9])]
    assert transport.sent(FromGateway) == [Pong()]


async def test_what_is_asked_in_one_turn_is_one_write_in_order(worker_side):
    connection, transport = worker_side
    for _ in range(3):
        connection.start(REQUEST, FakeSink())
    connection.cancel(StreamId(2))
    assert not transport.written
    await asyncio.sleep(0)
    assert transport.num_writes == 1
    assert [message.stream for message in transport.sent(FromGateway)] == [1, 2, 3, 2]


async def test_what_has_been_asked_is_sent_before_the_end(worker_side):
    connection, transport = worker_side
    stream = connection.start(REQUEST, FakeSink())
    connection.close()
    assert transport.is_closed
    assert [message.stream for message in transport.sent(FromGateway)] == [stream]


async def test_a_cancelled_request_hears_nothing_more(worker_side):
    connection, transport = worker_side
    sink = FakeSink()
    stream = connection.start(REQUEST, sink)
    await asyncio.sleep(0)
    transport.written.clear()
    connection.cancel(stream)
    connection.cancel(stream)
    await asyncio.sleep(0)
    assert transport.sent(FromGateway) == [Cancel(stream)]
    connection.data_received(frame(Step([Delta(stream, b"late", [1])], [DONE])))
    assert sink.news == []


async def test_a_lost_connection_is_told_to_every_sink_once(worker_side):
    connection, transport = worker_side
    sink = FakeSink()
    connection.start(REQUEST, sink)
    connection.connection_lost(ConnectionResetError("reset by peer"))
    connection.connection_lost(None)
    (lost,) = sink.news
    assert isinstance(lost, WorkerLost)
    assert str(lost) == "worker d0 was lost: reset by peer"
    assert connection.closed.result() == "reset by peer"
    transport.close()
    with pytest.raises(WorkerUnreachable, match="reset by peer"):
        connection.start(REQUEST, sink)


async def test_a_request_too_long_for_a_frame_is_refused_and_the_connection_lives(worker_side):
    connection, transport = worker_side
    with pytest.raises(WorkerUnreachable, match="the limit is 4096"):
        connection.start(msgspec.structs.replace(REQUEST, prompt=bytes(5000)), FakeSink())
    assert connection.num_streams == 0
    assert not transport.is_closed


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x00\x00\x00",
        b"\x03\x00\x00\x00abc",
        b"\xff\xff\xff\xff",
        frame({"type": "step", "done": 1}),
        frame({"no": "type"}),
        frame({"type": 1}),
    ],
)
async def test_what_is_no_frame_ends_the_connection(worker_side, garbage):
    connection, transport = worker_side
    connection.data_received(garbage)
    assert transport.is_closed


async def test_a_release_is_sent_in_order_and_names_the_request(worker_side):
    connection, transport = worker_side
    stream = connection.start(REQUEST, FakeSink())
    connection.cancel(stream)
    connection.release(REQUEST.request)
    await asyncio.sleep(0)
    assert transport.sent(FromGateway)[1:] == [Cancel(stream), Release(RequestId("r"))]


async def test_a_release_on_a_connection_that_ends_is_left_out(worker_side):
    connection, transport = worker_side
    transport.close()
    connection.release(REQUEST.request)
    await asyncio.sleep(0)
    assert not transport.written


NEWER = {"type": "of_a_later_version", "stream": 1, "more": [1, {"a": b"b"}]}


async def test_a_frame_of_a_later_version_is_passed_over_and_told_once(worker_side, gateway_side):
    sink = FakeSink()
    worker_side[0].start(REQUEST, sink)
    with capture_logs() as logs:
        worker_side[0].data_received(frame(NEWER) + frame(Step([Delta(StreamId(1), b"a", [4])])) + frame(NEWER))
        gateway_side[0].data_received(frame(NEWER) + frame(REQUEST) + frame(NEWER))
    assert sink.news == [(b"a", [4])]
    assert gateway_side[2].heard == [REQUEST]
    assert not worker_side[1].is_closed
    assert not gateway_side[1].is_closed
    assert [(log["event"], log["tag"]) for log in logs] == [("stream.unknown_frame", "of_a_later_version")] * 2


async def test_a_request_of_a_later_version_is_refused_and_the_others_go_on(gateway_side):
    connection, transport, handler = gateway_side
    later = msgspec.to_builtins(REQUEST, builtin_types=(bytes,)) | {"stream": 5, "leg": {"type": "of_a_later_version"}}
    connection.data_received(frame(later) + frame(REQUEST))
    await asyncio.sleep(0)
    assert handler.heard == [REQUEST]
    ((failed,),) = (step.failed for step in transport.sent(FromWorker))
    assert (failed.stream, failed.kind, failed.code) == (5, FailureKind.REJECTED, "unreadable_request")
    assert "of_a_later_version" in failed.message


async def test_another_worker_at_the_address_is_not_talked_to(worker_side):
    connection, transport = worker_side
    connection.data_received(frame(Hello(WORKER, 8)))
    assert transport.is_closed
    connection.connection_lost(None)
    assert connection.closed.result() == "d0 of epoch 8 answers there; wanted d0 of epoch 7"


async def test_a_ping_is_answered_by_both_sides(worker_side, gateway_side):
    for side in (worker_side, gateway_side):
        side[0].data_received(frame(Ping()))
    assert worker_side[1].sent(FromGateway) == [Pong()]
    assert gateway_side[1].sent(FromWorker) == [Pong()]


async def test_a_silent_peer_is_pinged_and_given_up_after_the_limit(worker_side):
    connection, transport = worker_side
    connection._beat()
    assert transport.sent(FromGateway) == []
    connection._beat()
    connection._beat()
    assert transport.sent(FromGateway) == [Ping(), Ping()]
    assert not transport.is_closed
    connection._beat()
    assert transport.is_closed


async def test_any_byte_heard_counts_as_life(worker_side):
    connection, transport = worker_side
    for _ in range(10):
        connection._beat()
        connection._beat()
        connection.data_received(frame(Pong()))
    assert not transport.is_closed


async def test_everything_posted_in_one_turn_is_one_step(gateway_side):
    connection, transport, _ = gateway_side
    deltas = [Delta(StreamId(i), b"x", [i]) for i in range(5)]
    for delta in deltas:
        connection.post(delta)
    connection.post(DONE)
    await asyncio.sleep(0)
    assert transport.sent(FromWorker) == [Step(deltas, [DONE])]
    connection.post(deltas[0])
    await asyncio.sleep(0)
    assert transport.sent(FromWorker) == [Step(deltas[:1])]


async def test_a_gateway_that_reads_too_slowly_is_cut_off(gateway_side):
    connection, transport, _ = gateway_side
    transport.unsent = 10_001
    connection.post(DONE)
    await asyncio.sleep(0)
    assert transport.is_closed


async def test_a_step_too_long_for_a_frame_ends_the_connection(gateway_side):
    connection, transport, _ = gateway_side
    connection.post(Delta(StreamId(1), bytes(5000), []))
    await asyncio.sleep(0)
    assert transport.is_closed


async def test_the_handler_hears_requests_cancels_releases_and_the_end(gateway_side):
    connection, _, handler = gateway_side
    connection.data_received(frame(REQUEST) + frame(Cancel(StreamId(4))) + frame(Release(RequestId("q"))))
    connection.connection_lost(None)
    assert handler.heard == [REQUEST, 4, "q", "gone"]
