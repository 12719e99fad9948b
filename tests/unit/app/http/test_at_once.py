"""Requests that are answered without a task of their own, and those that look like it."""

import asyncio
import gc
import weakref

import pytest
import uvicorn

from app.http.connection import ConnectionLimits
from app.http.response import Streamed
from app.http.server import HttpServer
from tests.raw_http import MAX_UNSENT, post, read_chunks, read_head, until
from tests.unit.app.http.conftest import served


class Application:
    """Says for each request how it is answered, and with which body it came. takes: whether at once."""

    def __init__(self):
        self.takes = True
        self.is_held = False
        self.responses = []
        self.left = []

    def at_once(self, scope, body, response):
        if not self.takes:
            return None
        self.responses.append(response)
        if not self.is_held:
            response.whole(200, [("x-how", "at once")], body)
        return lambda: self.left.append("left")

    async def with_task(self, request, response):
        body = await request.body()
        response.whole(200, [("x-how", f"task{request.headers.get('x-said', '')}")], body)


@pytest.fixture
def application():
    return Application()


@pytest.fixture
def state():
    return uvicorn.server.ServerState()


@pytest.fixture
async def connect(application, state):
    streamed = Streamed(
        application.with_task, max_unsent_bytes=MAX_UNSENT, on_cut_off=lambda: None, at_once=application.at_once
    )
    told = {"limits": ConnectionLimits(), "on_refused": lambda code: None, "at_once": {"/": streamed.begin}}
    async with served(streamed, state, **told) as connected:
        yield connected
    await until(lambda: not state.connections)


async def read_whole(reader):
    status, headers = await read_head(reader)
    assert status == "200"
    return headers["x-how"], await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), 60)


async def test_what_comes_whole_is_answered_without_a_task_and_the_connection_serves_again(connect, state):
    async with connect() as (reader, writer):
        for number in range(3):
            writer.write(post(body=b"body %d" % number))
            assert await read_whole(reader) == ("at once", b"body %d" % number)
            assert not state.tasks


async def test_what_is_let_go_of_one_request_is_not_the_next_one_s(application, connect):
    second = post(body=b"second").replace(b"\r\n\r\n", b"\r\nx-said: it\r\n\r\n")
    cut = second.index(b"x-said")
    async with connect() as (reader, writer):
        writer.write(post(body=b"first") + second[:cut])
        assert await read_whole(reader) == ("at once", b"first")
        application.takes = False
        writer.write(second[cut:])
        assert await read_whole(reader) == ("taskit", b"second")


async def test_what_comes_while_an_answer_lasts_is_read_after_it(application, connect):
    application.is_held = True
    async with connect() as (reader, writer):
        writer.write(post(body=b"first"))
        await until(lambda: application.responses)
        application.takes = False
        for piece in (post(body=b"second")[:9], post(body=b"second")[9:] + post(body=b"third")):
            writer.write(piece)
            await writer.drain()
        application.responses[0].whole(200, [("x-how", "at once")], b"1")
        assert await read_whole(reader) == ("at once", b"1")
        assert await read_whole(reader) == ("task", b"second")
        assert await read_whole(reader) == ("task", b"third")


async def test_chunks_that_come_with_their_head_are_the_body(connect):
    async with connect() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n")
        assert await read_whole(reader) == ("at once", b"body")


async def test_a_body_that_comes_later_is_waited_for_by_a_task(connect, state):
    data = post(body=b"body")
    async with connect() as (reader, writer):
        writer.write(data[:-2])
        await until(lambda: state.tasks)
        writer.write(data[-2:])
        assert await read_whole(reader) == ("task", b"body")


async def test_who_asks_first_whether_the_body_may_come_is_told_so(connect):
    async with connect() as (reader, writer):
        writer.write(post(body=b"body", extra=b"Expect: 100-continue\r\n"))
        assert (await read_head(reader))[0] == "100"
        assert await read_whole(reader) == ("task", b"body")


async def test_another_method_and_what_takes_waiting_have_their_task(application, connect):
    async with connect() as (reader, writer):
        writer.write(post(method="PUT", body=b"put"))
        assert await read_whole(reader) == ("task", b"put")
        application.takes = False
        writer.write(post(body=b"long"))
        assert await read_whole(reader) == ("task", b"long")


async def test_requests_sent_ahead_are_answered_in_their_order(connect):
    async with connect() as (reader, writer):
        writer.write(b"".join(post(body=b"%d" % number) for number in range(5)))
        assert [(await read_whole(reader))[1] for _ in range(5)] == [b"%d" % number for number in range(5)]


async def test_what_is_wrong_behind_a_request_is_told_after_its_answer(connect):
    async with connect() as (reader, writer):
        writer.write(post(body=b"body") + b"no HTTP at all\r\n\r\n")
        assert await read_whole(reader) == ("at once", b"body")
        assert (await read_head(reader))[0] == "400"


async def test_an_answer_that_goes_on_is_left_when_its_client_goes(application, connect):
    application.is_held = True
    async with connect() as (reader, writer):
        writer.write(post())
        await until(lambda: application.responses)
        application.responses[0].begin([])
        application.responses[0].write(b"first")
        await read_head(reader)
        assert application.left == []
    await until(lambda: application.left)
    assert application.left == ["left"]
    assert application.responses[0].is_gone


async def test_an_answer_that_has_ended_is_not_left(application, connect, state):
    application.is_held = True
    async with connect() as (reader, writer):
        writer.write(post())
        await until(lambda: application.responses)
        application.responses[0].begin([])
        application.responses[0].end(b"all")
        await read_head(reader)
        assert await read_chunks(reader) == [b"all"]
    await until(lambda: not state.connections)
    assert application.left == []


async def test_when_the_gateway_ends_answers_without_a_task_are_left(application, connect, state):
    application.is_held = True
    async with connect() as (reader, writer):
        writer.write(post())
        await until(lambda: application.responses)
        server = HttpServer(uvicorn.Config(None))
        server.server_state = state
        await server.cut_off()
        assert application.left == ["left"]
        assert await asyncio.wait_for(reader.read(), 60) == b"", "and their connections closed"


@pytest.mark.parametrize("is_at_once", [True, False])
async def test_nothing_of_a_request_waits_for_the_garbage_collector(application, connect, state, is_at_once):
    application.takes = is_at_once
    cycles = []
    gc.disable()
    try:
        async with connect() as (reader, writer):
            for _ in range(3):
                writer.write(post(body=b"body"))
                await read_whole(reader)
                (connection,) = state.connections
                cycles.append(weakref.ref(connection.cycle))
            application.responses.clear()
            await until(lambda: not state.tasks)
            assert [cycle() is None for cycle in cycles] == [True, True, False], "the last one is the connection's"
    finally:
        gc.enable()


async def test_who_answers_a_client_that_has_gone_is_forgotten(application, connect, state):
    application.is_held = True
    async with connect() as (_reader, writer):
        writer.write(post())
        await until(lambda: state.connections and application.responses)
        (connection,) = state.connections
        assert connection.on_gone is not None
    await until(lambda: application.left)
    assert connection.on_gone is None
