import gc
import weakref

import pytest

from app.responses.keeping import KeepingResponse
from app.serving.errors import GatewayStopping
from planes.wire.frames import Format
from planes.wire.response_object import event, response_event, response_object
from tests.fakes import FakeResponse
from tests.openai_types import sse

LAYOUT = Format("response", "resp_0", "m", 7)
BODY = response_object(LAYOUT, "completed")
DELTA = event("response.output_text.delta", 3, b'"delta":"x"')
LAST = response_event("response.completed", 4, BODY)


async def test_a_stream_ends_when_it_is_stored():
    client, kept = FakeResponse(), []

    async def keep(body):
        assert not client.is_ended
        kept.append(body)

    response = KeepingResponse(client, LAYOUT, headers=[("a", "b")], keep=keep)
    response.begin([])
    response.write(DELTA)
    response.end(DELTA + LAST)
    assert (client.payloads, client.headers["a"]) == ([DELTA], "b")
    assert response.is_ended
    await response.settle()
    assert kept == [BODY]
    assert client.payloads == [DELTA, DELTA + LAST]
    assert client.is_ended


async def test_an_answer_in_one_piece_is_stored_first_too():
    client, kept = FakeResponse(), []

    async def keep(body):
        assert not client.is_begun
        kept.append(body)

    response = KeepingResponse(client, LAYOUT, keep=keep)
    response.whole(200, [], BODY)
    await response.settle()
    assert kept == [client.body] == [BODY]


async def test_what_fails_in_midstream_is_told_with_the_next_number_and_not_stored():
    async def keep(body):
        raise AssertionError(body)

    client = FakeResponse()
    response = KeepingResponse(client, LAYOUT, keep=keep)
    response.begin([])
    response.write(DELTA)
    response.fail(GatewayStopping(), [])
    await response.settle()
    (told,) = sse(client.payloads[-1])
    assert (told["type"], told["sequence_number"]) == ("response.failed", 4)
    assert client.is_ended


async def test_what_fails_before_its_head_is_an_error_as_any_other():
    client = FakeResponse()
    KeepingResponse(client, LAYOUT).fail(GatewayStopping(), [])
    assert client.status == 502


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_what_was_asked_does_not_wait_for_the_garbage_collector(is_streamed):
    async def keep(body):
        """Knows what was asked."""

    asked = weakref.ref(keep)
    gc.disable()
    try:
        response = KeepingResponse(FakeResponse(), LAYOUT, keep=keep)
        del keep
        if is_streamed:
            response.begin([])
            response.end(LAST)
        else:
            response.whole(200, [], BODY)
        await response.settle()
        assert asked() is not None
        del response
        assert asked() is None
    finally:
        gc.enable()
