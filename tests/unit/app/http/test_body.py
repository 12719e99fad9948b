import asyncio

import pytest

from app.http.body import read_body
from app.openai.errors import BodyTooLarge
from tests.raw_http import post, read_head


@pytest.mark.parametrize("is_announced", [True, False])
async def test_a_body_beyond_the_limit_is_refused_before_it_has_come(recorder, connect, is_announced):
    async def read(request, answer):
        try:
            await read_body(request, 10)
        except BodyTooLarge as exc:
            await answer.send_whole(413, [], str(exc).encode())

    recorder.produce = read
    async with connect() as (reader, writer):
        if is_announced:
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        else:
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nb\r\n12345678901\r\n")
        status, headers = await read_head(reader)
        assert status == "413"
        body = await reader.readexactly(int(headers["content-length"]))
        assert b"limit is 10" in body
        assert (b"100000000" if is_announced else b"11 bytes") in body


async def test_a_body_at_the_limit_is_read(recorder, connect):
    async def read(request, answer):
        await answer.send_whole(200, [], await read_body(request, 10))

    recorder.produce = read
    async with connect() as (reader, writer):
        writer.write(post(body=b"0123456789"))
        await read_head(reader)
        assert await reader.readexactly(10) == b"0123456789"


async def test_a_client_that_leaves_while_sending_ends_the_request(recorder, connect):
    reading = asyncio.Event()

    async def read(request, answer):
        reading.set()
        await read_body(request, 100)

    recorder.produce = read
    async with connect() as (_, writer):
        writer.write(post(body=b"x" * 50)[:-20])
        await asyncio.wait_for(reading.wait(), 5)
    assert await asyncio.wait_for(recorder.ended.get(), 5) == "cancelled"
