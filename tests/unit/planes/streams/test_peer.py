from structlog.testing import capture_logs

from planes.wire.frames import Delta, FromGateway, FromWorker, Ping, Pong, Step, StreamId
from tests.streams import REQUEST, FakeSink, frame

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


async def test_a_ping_is_answered_by_both_sides(worker_side, gateway_side):
    for side in (worker_side, gateway_side):
        side[0].data_received(frame(Ping()))
    assert worker_side[1].sent(FromGateway) == [Pong()]
    assert gateway_side[1].sent(FromWorker) == [Pong()]
