import asyncio

import pytest

from app.http.body import read_body
from tests.raw_http import MAX_UNSENT, post, read_chunks, read_head


async def say_hello(request, response):
    response.begin([("x-policy", "test")])
    response.write(b"hello")
    response.write(b"world")
    response.end()


async def test_each_payload_is_a_chunk_and_the_connection_serves_again(recorder, connect):
    recorder.produce = say_hello
    async with connect() as (reader, writer):
        for _ in range(3):
            writer.write(post())
            status, headers = await read_head(reader)
            assert (status, headers["x-policy"]) == ("200", "test")
            assert headers["transfer-encoding"] == "chunked"
            assert headers["content-type"] == "text/event-stream"
            assert await read_chunks(reader) == [b"hello", b"world"]


class Counting:
    """A transport that remembers what is written to it."""

    def __init__(self, transport):
        self._transport = transport
        self.writes = []

    def write(self, data):
        self.writes.append(data)
        self._transport.write(data)

    def __getattr__(self, name):
        return getattr(self._transport, name)


def counted(recorder, produce):
    """Let `recorder` answer with `produce`.  Returns: the transports of its answers."""
    transports = []

    async def watched(request, response):
        response._transport = Counting(response._transport)
        transports.append(response._transport)
        await produce(request, response)

    recorder.produce = watched
    return transports


async def test_the_head_and_the_first_chunk_are_one_write(recorder, connect):
    transports = counted(recorder, say_hello)
    async with connect() as (reader, writer):
        writer.write(post())
        await read_head(reader)
        assert await read_chunks(reader) == [b"hello", b"world"]
    begin, _, end = transports[0].writes
    assert begin.endswith(b"\r\n\r\n5\r\nhello\r\n")
    assert end == b"0\r\n\r\n"


async def test_an_answer_that_is_known_whole_is_one_write(recorder, connect):
    async def short(request, response):
        response.begin([("x-policy", "test")])
        response.end(b"last")

    transports = counted(recorder, short)
    async with connect() as (reader, writer):
        for _ in range(2):
            writer.write(post())
            status, headers = await read_head(reader)
            assert (status, headers["x-policy"]) == ("200", "test")
            assert await read_chunks(reader) == [b"last"]
    assert [len(transport.writes) for transport in transports] == [1, 1]


async def test_the_last_chunk_and_the_end_are_one_write(recorder, connect):
    async def stream(request, response):
        response.begin([])
        response.write(b"first")
        response.end(b"last")

    transports = counted(recorder, stream)
    async with connect() as (reader, writer):
        writer.write(post(extra=b"Connection: close\r\n"))
        await read_head(reader)
        assert await read_chunks(reader) == [b"first", b"last"]
        assert await asyncio.wait_for(reader.read(), 60) == b""
    assert transports[0].writes[1:] == [b"4\r\nlast\r\n0\r\n\r\n"]


async def test_a_client_that_wants_no_more_is_told_so_and_let_go(recorder, connect):
    recorder.produce = say_hello
    async with connect() as (reader, writer):
        writer.write(post(extra=b"Connection: close\r\n"))
        _, headers = await read_head(reader)
        assert headers["connection"] == "close"
        assert await read_chunks(reader) == [b"hello", b"world"]
        assert await asyncio.wait_for(reader.read(), 60) == b""


async def test_a_header_cannot_smuggle_in_another(recorder, connect):
    async def smuggle(request, response):
        with pytest.raises(ValueError, match="control character"):
            response.begin([("x-policy", "a\r\nset-cookie: b")])
        response.whole(500, [], b"")

    recorder.produce = smuggle
    async with connect() as (reader, writer):
        writer.write(post())
        status, headers = await read_head(reader)
        assert (status, "set-cookie" in headers) == ("500", False)


async def test_pipelined_requests_are_answered_in_order(recorder, connect):
    async def echo(request, response):
        body = await read_body(request, 100)
        response.begin([])
        response.write(body)
        response.end()

    recorder.produce = echo
    async with connect() as (reader, writer):
        writer.write(post(body=b"first") + post(body=b"second"))
        for expected in (b"first", b"second"):
            await read_head(reader)
            assert await read_chunks(reader) == [expected]


async def test_who_goes_is_noticed_in_the_second_of_two_pipelined_requests_too(recorder, connect):
    begun = asyncio.Event()

    async def first_at_once(request, response):
        body = await read_body(request, 100)
        if body == b"first":
            asyncio.get_running_loop().call_soon(response.whole, 200, [], b"one")  # as a worker's last word ends it
            for _ in range(3):
                await asyncio.sleep(0)
            return
        begun.set()
        await asyncio.Event().wait()

    recorder.produce = first_at_once
    async with connect() as (_, writer):
        writer.write(post(body=b"first") + post(body=b"second"))
        assert await asyncio.wait_for(recorder.ended.get(), 60) == "done"
        await asyncio.wait_for(begun.wait(), 60)
    assert await asyncio.wait_for(recorder.ended.get(), 60) == "cancelled"


async def test_http_1_0_gets_a_body_that_ends_with_the_connection(recorder, connect):
    recorder.produce = say_hello
    async with connect() as (reader, writer):
        writer.write(post("1.0"))
        _, headers = await read_head(reader)
        assert "transfer-encoding" not in headers
        assert headers["connection"] == "close"
        assert await asyncio.wait_for(reader.read(), 60) == b"helloworld"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_head_that_cannot_be_encoded_leaves_room_for_an_error(recorder, connect, is_streamed):
    async def refuse(request, response):
        headers = [("x-policy", "流れ")]
        with pytest.raises(ValueError, match="latin-1"):
            response.begin(headers) if is_streamed else response.whole(200, headers, b"{}")
        assert not response.is_begun
        response.whole(500, [("retry-after", "1")], b"{}")

    recorder.produce = refuse
    async with connect() as (reader, writer):
        writer.write(post())
        status, headers = await read_head(reader)
        assert (status, headers["content-length"], headers["retry-after"]) == ("500", "2", "1")
        assert await reader.readexactly(2) == b"{}"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_answer_ends_once(recorder, connect, is_streamed):
    async def twice(request, response):
        if is_streamed:
            response.begin([])
            response.end(b"{}")
        else:
            response.whole(200, [], b"{}")
        with pytest.raises(RuntimeError, match="ENDED"):
            response.end()
        with pytest.raises(RuntimeError, match="ENDED"):
            response.whole(500, [], b"")

    recorder.produce = twice
    async with connect() as (reader, writer):
        writer.write(post() + post())
        for _ in range(2):
            assert (await read_head(reader))[0] == "200"
            assert await (read_chunks(reader) if is_streamed else reader.readexactly(2)) in ([b"{}"], b"{}")


async def test_a_client_that_asks_on_and_never_reads_is_cut_off_at_the_limit(recorder, connect):
    async def whole(request, response):
        response.whole(200, [], b"x" * MAX_UNSENT)

    recorder.produce = whole
    async with connect() as (_, writer):
        writer.transport.pause_reading()
        while not recorder.cut_off:
            writer.write(post())
            await asyncio.sleep(0)
    assert recorder.cut_off == 1


@pytest.mark.parametrize("is_begun", [False, True])
async def test_a_gone_client_ends_the_answer_though_nothing_is_written(recorder, connect, is_begun):
    started = asyncio.Event()

    async def wait_for_ever(request, response):
        if is_begun:
            response.begin([])
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            assert response.is_gone

    recorder.produce = wait_for_ever
    async with connect() as (_, writer):
        writer.write(post())
        await asyncio.wait_for(started.wait(), 60)
    assert await asyncio.wait_for(recorder.ended.get(), 60) == "cancelled"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_does_not_read_is_cut_off_at_the_limit(recorder, connect, version):
    written = 0

    async def flood(request, response):
        nonlocal written
        response.begin([])
        while written < 1_000 * MAX_UNSENT:  # many times what the kernel takes
            response.write(b"x" * 10_000)
            written += 10_000
            await asyncio.sleep(0)

    recorder.produce = flood
    async with connect() as (_, writer):
        writer.transport.pause_reading()
        writer.write(post(version))
        assert await asyncio.wait_for(recorder.ended.get(), 60) == "cancelled"
    assert recorder.cut_off == 1
    assert written > MAX_UNSENT


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_what_comes_for_a_client_that_was_cut_off_goes_nowhere(recorder, connect, version):
    tokens = []

    async def flood(response):
        for _ in range(1_000):  # a worker's connection does not know yet that this client has gone
            response.write(b"x" * 10_000)
            await asyncio.sleep(0)
        response.keep_alive()
        response.end(b"last")

    async def begin(request, response):
        response.begin([])
        tokens.append(asyncio.create_task(flood(response)))
        await asyncio.Event().wait()

    recorder.produce = begin
    async with connect() as (_, writer):
        writer.transport.pause_reading()
        writer.write(post(version))
        assert await asyncio.wait_for(recorder.ended.get(), 20) == "cancelled"
    await tokens[0]
    assert recorder.cut_off == 1


async def test_a_slow_client_below_the_limit_gets_everything(recorder, connect):
    async def burst(request, response):
        response.begin([])
        for i in range(9):
            response.write(b"%d" % i * 10_000)
        response.end()

    recorder.produce = burst
    async with connect() as (reader, writer):
        writer.write(post())
        await read_head(reader)
        assert [len(chunk) for chunk in await read_chunks(reader)] == [10_000] * 9


COMMENT = b": keep-alive\n\n"


async def test_a_silent_stream_gets_its_head_and_a_comment_and_one_that_speaks_gets_none(recorder, connect):
    async def slow(request, response):
        response.begin([])
        response.keep_alive()  # nothing has been said yet
        response.write(b"one")
        response.keep_alive()
        response.write(b"two")
        response.keep_alive()
        response.keep_alive()  # nothing since
        response.keep_alive()
        response.end(b"three")

    transports = counted(recorder, slow)
    async with connect() as (reader, writer):
        for _ in range(2):
            writer.write(post())
            status, _ = await read_head(reader)
            assert status == "200"
            assert await read_chunks(reader) == [COMMENT, b"one", b"two", COMMENT, COMMENT, b"three"]
    assert [len(transport.writes) for transport in transports] == [6, 6]


async def test_silence_at_the_end_leaves_no_trace(recorder, connect):
    async def quiet(request, response):
        response.begin([])
        response.write(b"one")
        response.keep_alive()
        response.end()

    recorder.produce = quiet
    async with connect() as (reader, writer):
        writer.write(post())
        await read_head(reader)
        assert await read_chunks(reader) == [b"one"]
