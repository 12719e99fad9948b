import asyncio
import json
import tracemalloc
from contextlib import AsyncExitStack

import pytest

from app.http.body import read_body
from app.http.connection import ConnectionLimits
from tests.raw_http import post, read_chunks, read_head, until

SOON = 0.25
NEVER = 3600.0

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


@pytest.fixture
def limits(request):
    return ConnectionLimits(read_timeout_s=getattr(request, "param", NEVER), num_connections=20)


soon = pytest.mark.parametrize("limits", [SOON], indirect=True)


async def echo(request, response):
    response.whole(200, [], await read_body(request, 1 << 20))


async def whole(reader, writer=None):
    """Status and body of an answer with a length."""
    status, headers = await read_head(reader)
    return status, await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), 60)


async def refused(reader):
    """Status and code of the connection's last answer."""
    status, headers = await read_head(reader)
    assert headers["connection"] == "close"
    body = await asyncio.wait_for(reader.read(), 60)
    assert len(body) == int(headers["content-length"])
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["code"]


async def test_one_connection_more_than_the_limit_is_refused_and_the_others_go_on(recorder, connect, limits):
    recorder.produce = echo
    async with AsyncExitStack() as stack:
        held = [await stack.enter_async_context(connect()) for _ in range(limits.num_connections)]
        for reader, writer in held:
            writer.write(post(body=b"hello"))
            assert await whole(reader) == ("200", b"hello")
        async with connect() as (reader, _):
            assert await refused(reader) == ("503", "too_many_connections")
        reader, writer = held[0]
        writer.write(post(body=b"again"))
        assert await whole(reader) == ("200", b"again")
    assert recorder.refusals == ["too_many_connections"]


async def test_connections_to_one_listener_share_its_address(recorder, connect, server_state):
    recorder.produce = echo
    async with connect() as first, connect() as second:
        for reader, writer in (first, second):
            writer.write(post(body=b"hello"))
            await whole(reader)
        addresses = [connection.server for connection in server_state.connections]
    assert len(addresses) == 2
    assert addresses[0] is addresses[1]


@pytest.mark.parametrize("size", [1, 1_000, 10**9])
async def test_a_head_without_end_is_refused_at_the_limit(recorder, connect, size):
    recorder.produce = echo
    line = b"a" * min(size, 100_000)
    async with connect() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nX-A: ")
        tracemalloc.start()
        for _ in range(200_000 // len(line)):
            writer.write(line)
        assert await refused(reader) == ("431", "head_too_large")
        assert recorder.refusals == ["head_too_large"]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4_000_000
    assert recorder.ended.empty()


async def test_a_head_at_the_limit_is_read(recorder, connect, limits):
    recorder.produce = echo
    fields = b"X-A: %b\r\n" % (b"a" * 60_000)
    async with connect() as (reader, writer):
        writer.write(post(body=b"hello", extra=fields))
        assert await whole(reader) == ("200", b"hello")
        writer.write(post(body=b"again", extra=fields))
        assert await whole(reader) == ("200", b"again"), "each request counts anew"


async def test_the_number_of_fields_is_limited(recorder, connect, limits):
    recorder.produce = echo
    for num, expected in ((limits.num_fields - 2, "200"), (limits.num_fields - 1, "431"), (5_000, "431")):
        async with connect() as (reader, writer):
            writer.write(post(extra=b"A: b\r\n" * num))
            status, _ = await read_head(reader)
            assert status == expected


@pytest.mark.parametrize(
    "flood",
    [b"0\r\n" + b"X-A: " + b"a" * 200_000, b"0\r\n" + b"A: b\r\n" * 40_000, b"5;" + b"e" * 200_000, b"\r\n" * 200_000],
    ids=["one trailer", "many trailers", "chunk extension", "nothing at all"],
)
async def test_what_is_neither_head_nor_body_is_limited_as_well(recorder, connect, flood):
    recorder.produce = echo
    async with connect() as (reader, writer):
        if flood.strip():
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(flood)
        assert (await refused(reader))[0] == "431"


async def test_a_trailer_is_no_field_of_the_head(recorder, connect):
    seen = []

    async def produce(request, response):
        await read_body(request, 100)
        seen.extend(request.scope["headers"])
        response.whole(200, [], b"")

    recorder.produce = produce
    async with connect() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-T: 1\r\n\r\n")
        assert (await whole(reader))[0] == "200"
    assert b"x-t" not in dict(seen)


@soon
@pytest.mark.parametrize(
    ("part", "answered"),
    [
        (b"POST / HT", "408"),
        (b"POST / HTTP/1.1\r\nHost: x\r\n", "408"),
        (post(body=b"x" * 99)[:-5], "408"),
        (b"\r\n", "408"),
    ],
)
async def test_a_request_that_does_not_come_whole_in_time_is_refused(recorder, connect, part, answered):
    recorder.produce = echo
    async with connect() as (reader, writer):
        writer.write(part)
        assert await refused(reader) == (answered, "request_timeout")
        assert recorder.refusals == ["request_timeout"]


@soon
async def test_a_trickle_buys_no_time(recorder, connect):
    recorder.produce = echo
    async with connect() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")

        async def trickle():
            while True:
                writer.write(b"x")
                await asyncio.sleep(SOON / 10)

        trickling = asyncio.create_task(trickle())
        assert await refused(reader) == ("408", "request_timeout")
        trickling.cancel()
    assert await asyncio.wait_for(recorder.ended.get(), 60) == "cancelled"


@soon
async def test_the_answer_may_take_longer_than_the_request(recorder, connect):
    async def slow(request, response):
        response.begin([])
        await asyncio.sleep(4 * SOON)
        response.end(b"late")

    recorder.produce = slow
    async with connect() as (reader, writer):
        writer.write(post() + b"POST / HT")  # the next one has begun, and waits for this answer
        await read_head(reader)
        assert await read_chunks(reader) == [b"late"]
        assert (await refused(reader))[0] == "408"


@soon
async def test_a_body_that_nobody_wants_has_a_deadline_too(recorder, connect):
    async def refuse(request, response):
        response.whole(401, [], b"")

    recorder.produce = refuse
    async with connect() as (reader, writer):
        writer.write(post(body=b"x" * 99)[:-5])
        assert (await whole(reader))[0] == "401", "at once: the body is not waited for"
        assert await asyncio.wait_for(reader.read(), 60) == b""


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("gap", [False, True], ids=["one segment", "body later"])
@pytest.mark.parametrize(
    "extra", [H2C, b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Connection: Upgrade\r\nUpgrade: TLS/1.2\r\n"]
)
async def test_a_wish_for_another_protocol_changes_nothing(recorder, connect, server_state, extra, gap, version):
    recorder.produce = echo
    async with connect() as (reader, writer):
        request = post(version, body=b"hello", extra=extra)
        cut = request.index(b"\r\n\r\n") + 4 if gap else len(request)
        writer.write(request[:cut])
        if gap:
            await until(lambda: any(connection._has_head for connection in server_state.connections))
            writer.write(request[cut:])
        assert await whole(reader) == ("200", b"hello")
        if version == "1.1":
            writer.write(post(body=b"again"))
            assert await whole(reader) == ("200", b"again"), "one answer, and the connection goes on"


async def test_a_chunked_body_with_such_a_wish_and_a_request_behind_it(recorder, connect):
    recorder.produce = echo
    async with connect() as (reader, writer):
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + H2C + b"\r\n"
        writer.write(head + b"5\r\nhello\r\n0\r\n\r\n" + post(body=b"again"))
        assert [await whole(reader), await whole(reader)] == [("200", b"hello"), ("200", b"again")]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"),
        (b"GET / HTTP/1.0\r\n\r\n", "200"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "405"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400"),
        (b"GET \xff HTTP/1.1\r\nHost: a\r\n\r\n", "400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "400"),
    ],
    ids=["no Host", "two Hosts", "no Host in 1.0", "CONNECT", "HTTP/2", "a path of bytes", "TLS"],
)
async def test_a_head_that_is_none_is_refused_in_openai_s_shape(recorder, connect, head, expected):
    recorder.produce = echo
    async with connect() as (reader, writer):
        writer.write(head)
        status = (await whole(reader))[0] if expected == "200" else (await refused(reader))[0]
        assert status == expected


async def test_a_refusal_waits_for_the_answers_before_it(recorder, connect, server_state):
    going = asyncio.Event()

    async def wait(request, response):
        await going.wait()
        await echo(request, response)

    recorder.produce = wait
    async with connect() as (reader, writer):
        writer.write(post(body=b"first") + post(body=b"second") + b"GET / HTTP/1.1\r\n\r\n" + post(body=b"never"))
        (connection,) = server_state.connections
        await until(lambda: connection._is_refused)
        going.set()
        assert [await whole(reader), await whole(reader)] == [("200", b"first"), ("200", b"second")]
        assert await refused(reader) == ("400", "invalid_http")
    assert recorder.ended.qsize() == 2


async def test_a_body_that_breaks_off_behind_another_request_is_refused_in_its_turn(recorder, connect):
    recorder.produce = echo
    async with connect() as (reader, writer):
        writer.write(
            post(body=b"first") + b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX"
        )
        assert await whole(reader) == ("200", b"first")
        assert await refused(reader) == ("400", "invalid_http")


async def test_requests_sent_ahead_are_limited(recorder, connect, limits):
    recorder.produce = echo
    async with connect() as (reader, writer):
        writer.write(post() * 5_000)
        for _ in range(1 + limits.num_pipelined):
            assert (await whole(reader))[0] == "200"
        assert await refused(reader) == ("429", "too_many_pipelined")


async def test_others_are_served_while_clients_flood(recorder, connect):
    recorder.produce = echo
    num_refused = 0

    async def flood():
        nonlocal num_refused
        while True:
            async with connect() as (reader, writer):
                writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 1_000_000)
                assert (await read_head(reader))[0] == "431"
                num_refused += 1

    flooding = [asyncio.create_task(flood()) for _ in range(3)]
    async with connect() as (reader, writer):
        while num_refused < 20:
            writer.write(post(body=b"hello"))
            assert await whole(reader) == ("200", b"hello")
    for task in flooding:
        task.cancel()
    assert {type(each) for each in await asyncio.gather(*flooding, return_exceptions=True)} == {asyncio.CancelledError}


@pytest.mark.parametrize(
    "part", [b"", b"POST / HT", post(body=b"x" * 99)[:-5]], ids=["idle", "half a head", "half a body"]
)
async def test_a_server_that_stops_waits_for_no_request(recorder, connect, server_state, part):
    recorder.produce = echo
    async with connect() as (reader, writer):
        writer.write(post() + part)
        await whole(reader)
        (connection,) = server_state.connections
        await until(lambda: connection._is_receiving == bool(part))
        connection.shutdown()
        if part.startswith(b"POST / HTTP"):
            assert await refused(reader) == ("503", "gateway_stopping")
        else:
            assert await asyncio.wait_for(reader.read(), 60) == b""
        await until(lambda: not server_state.connections and not server_state.tasks)


async def test_a_server_that_stops_lets_answers_end(recorder, connect, server_state):
    going = asyncio.Event()

    async def wait(request, response):
        response.begin([])
        response.write(b"first")
        await going.wait()
        response.end(b"last")

    recorder.produce = wait
    async with connect() as (reader, writer):
        writer.write(post() + post(body=b"x" * 99)[:-5])
        await read_head(reader)
        (connection,) = server_state.connections
        await until(lambda: connection._is_receiving)
        connection.shutdown()
        going.set()
        assert await read_chunks(reader) == [b"first", b"last"]
        assert await refused(reader) == ("503", "gateway_stopping")
