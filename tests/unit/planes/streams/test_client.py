import asyncio

import msgspec
import pytest

from planes.streams.client import WorkerLost, WorkerUnreachable
from planes.wire.frames import (
    Cancel,
    Delta,
    Failed,
    FailureKind,
    FromGateway,
    Hello,
    Ping,
    Pong,
    Release,
    Step,
    StreamId,
)
from planes.wire.messages import RequestId
from tests.streams import DONE, REQUEST, WORKER, FakeSink, frame


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


class Broken(FakeSink):
    """A defect of ours."""

    def on_delta(self, payload, tokens):
        raise RuntimeError("planted")

    on_done = on_delta


async def test_one_request_s_defect_is_no_other_s_end(worker_side):
    connection, transport = worker_side
    broken, whole = Broken(), FakeSink()
    connection.start(REQUEST, broken)
    connection.start(REQUEST, whole)
    await asyncio.sleep(0)
    transport.sent(FromGateway)
    step = Step([Delta(StreamId(1), b"a", [1]), Delta(StreamId(2), b"b", [2])])
    connection.data_received(frame(step) + frame(step))
    connection.data_received(frame(Step([], [msgspec.structs.replace(DONE, stream=StreamId(2))])))
    await asyncio.sleep(0)
    assert whole.news == [(b"bb", [2, 2]), msgspec.structs.replace(DONE, stream=StreamId(2))]
    assert [type(news) for news in broken.news] == [WorkerLost]
    assert transport.sent(FromGateway) == [Cancel(StreamId(1))]
    assert not transport.is_closed


async def test_a_defect_at_a_request_s_end_is_its_own(worker_side):
    connection, transport = worker_side
    broken, whole = FakeSink(), FakeSink()
    broken.on_done = Broken().on_done
    connection.start(REQUEST, broken)
    connection.start(REQUEST, whole)
    connection.data_received(frame(Step([], [DONE, msgspec.structs.replace(DONE, stream=StreamId(2))])))
    await asyncio.sleep(0)
    assert len(whole.news) == 1
    assert [type(news) for news in broken.news] == [WorkerLost]
    assert not transport.is_closed


async def test_the_last_word_on_a_cancelled_stream_is_for_whoever_asked_for_it(worker_side):
    connection, _ = worker_side
    sink, told = FakeSink(), []
    stream = connection.start(REQUEST, sink)
    connection.cancel(stream, told.append)
    connection.data_received(frame(Step([Delta(stream, b"b", [5])], [DONE])))
    connection.data_received(frame(Step([], [DONE])))
    assert (told, sink.news) == ([DONE], [])
    connection.cancel(stream, told.append)
    assert len(told) == 1, "it had ended"


async def test_a_defect_with_the_last_word_on_a_cancelled_stream_is_nobody_elses_end(worker_side):
    connection, transport = worker_side
    whole, told = FakeSink(), []
    for on_rest in (Broken().on_done, told.append):
        connection.cancel(connection.start(REQUEST, FakeSink()), on_rest)
    connection.start(REQUEST, whole)
    ends = [msgspec.structs.replace(DONE, stream=StreamId(stream)) for stream in (1, 2, 3)]
    connection.data_received(frame(Step([], ends)))
    assert (told, whole.news) == ([ends[1]], [ends[2]])
    assert not transport.is_closed


async def test_a_defect_at_a_lost_connection_leaves_the_others_told(worker_side):
    connection, _ = worker_side
    broken, whole = FakeSink(), FakeSink()
    broken.on_lost = Broken().on_done
    connection.start(REQUEST, broken)
    connection.start(REQUEST, whole)
    connection.connection_lost(None)
    assert [type(news) for news in whole.news] == [WorkerLost]


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


async def test_another_worker_at_the_address_is_not_talked_to(worker_side):
    connection, transport = worker_side
    connection.data_received(frame(Hello(WORKER, 8)))
    assert transport.is_closed
    connection.connection_lost(None)
    assert connection.closed.result() == "d0 of epoch 8 answers there; wanted d0 of epoch 7"


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
