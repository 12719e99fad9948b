import asyncio

import msgspec

from planes.wire.frames import (
    Cancel,
    Delta,
    FailureKind,
    FromWorker,
    Release,
    Step,
    StreamId,
)
from planes.wire.messages import RequestId
from tests.streams import DONE, REQUEST, frame


async def test_a_request_of_a_later_version_is_refused_and_the_others_go_on(gateway_side):
    connection, transport, handler = gateway_side
    later = msgspec.to_builtins(REQUEST, builtin_types=(bytes,)) | {"stream": 5, "leg": {"type": "of_a_later_version"}}
    connection.data_received(frame(later) + frame(REQUEST))
    await asyncio.sleep(0)
    assert handler.heard == [REQUEST]
    ((failed,),) = (step.failed for step in transport.sent(FromWorker))
    assert (failed.stream, failed.kind, failed.code) == (5, FailureKind.REJECTED, "unreadable_request")
    assert "of_a_later_version" in failed.message


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
