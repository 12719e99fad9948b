import asyncio

import pytest

from app.http.body import BodiesFull, BodyMemory, read_body, useful_bytes
from app.openai import errors
from app.openai.errors import BodyTooLarge, UnsupportedEncoding
from tests.raw_http import post, read_head, until


@pytest.mark.parametrize("is_announced", [True, False])
async def test_a_body_beyond_the_limit_is_refused_before_it_has_come(recorder, connect, is_announced):
    async def read(request, response):
        try:
            await read_body(request, 10)
        except BodyTooLarge as exc:
            response.whole(413, [], str(exc).encode())

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
    async def read(request, response):
        response.whole(200, [], await read_body(request, 10))

    recorder.produce = read
    async with connect() as (reader, writer):
        writer.write(post(body=b"0123456789"))
        await read_head(reader)
        assert await reader.readexactly(10) == b"0123456789"


async def test_a_client_that_leaves_while_sending_ends_the_request(recorder, connect):
    reading = asyncio.Event()

    async def read(request, response):
        reading.set()
        await read_body(request, 100)

    recorder.produce = read
    async with connect() as (_, writer):
        writer.write(post(body=b"x" * 50)[:-20])
        await asyncio.wait_for(reading.wait(), 60)
    assert await asyncio.wait_for(recorder.ended.get(), 60) == "cancelled"


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
async def test_a_compressed_body_is_refused_by_the_name_of_its_encoding(recorder, connect, encoding):
    async def read(request, response):
        try:
            await read_body(request, 100)
        except UnsupportedEncoding as exc:
            refusal = errors.response(exc)
            response.whole(refusal.status, [], refusal.body)

    recorder.produce = read
    async with connect() as (reader, writer):
        writer.write(post(body=b"\x1f\x8b", extra=b"Content-Encoding: %b\r\n" % encoding.encode()))
        status, headers = await read_head(reader)
        assert status == "415"
        assert encoding.encode() in await reader.readexactly(int(headers["content-length"]))


async def test_all_bodies_together_are_limited_by_what_has_come_and_small_ones_are_never_refused(recorder, connect):
    memory = BodyMemory(300_000)

    async def read(request, response):
        with memory.lease() as lease:
            try:
                response.whole(200, [], b"%d" % len(await read_body(request, 1 << 30, lease)))
            except BodiesFull as exc:
                response.whole(errors.response(exc).status, [("retry-after", "1")], b"")

    recorder.produce = read
    async with connect() as (_, announcing), connect() as (_, sending), connect() as (reader, writer):
        announcing.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        sending.write(post(body=b"x" * 400_000)[:-100_000])
        await until(lambda: memory.num_bytes >= 200_000)
        writer.write(post(body=b"x" * 200_000))
        status, headers = await read_head(reader)
        assert (status, headers["retry-after"]) == ("503", "1")
        writer.write(post(body=b"x" * 60_000))
        status, _ = await read_head(reader)
        assert (status, await reader.readexactly(5)) == ("200", b"60000")
        assert memory.num_bytes < 300_000
    await until(lambda: recorder.ended.qsize() == 4)
    assert memory.num_bytes == 0


def test_a_body_may_be_as_long_as_the_longest_context_can_need():
    assert useful_bytes(8192) == (1 << 20) + 64 * 8192
