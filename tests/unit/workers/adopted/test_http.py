import asyncio

import pytest

from planes.wire.errors import UnusableSetting
from tests.unit.workers.adopted.vllm_server import PATIENCE_S, VllmServer, chunk, streamed
from workers.adopted.http import Address, HttpClient, ServerGone, parse_address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://10.0.0.7:8000", Address("10.0.0.7", 8000)),
        ("http://vllm", Address("vllm", 80)),
        ("https://vllm/pool/a/", Address("vllm", 443, "/pool/a", is_tls=True)),
        ("http://[::1]:8000", Address("::1", 8000)),
    ],
)
def test_a_server_s_url_is_read(url, address):
    assert parse_address(url) == address


@pytest.mark.parametrize("url", ["10.0.0.7:8000", "ftp://x", "http://", "http://x:y", "http://u:p@x", "http://x?a=1"])
def test_what_is_no_url_of_a_server_is_refused(url):
    with pytest.raises(UnusableSetting, match="URL of a vLLM server"):
        parse_address(url)


def test_an_ipv6_host_is_named_in_brackets():
    assert Address("::1", 8000).netloc == "[::1]:8000"


async def test_an_answer_comes_whole_with_its_status():
    async with VllmServer() as server:
        assert await server.client().ask("GET", "/version", timeout_s=PATIENCE_S) == (200, b'{"version":"0.32.0"}')
        assert (await server.client().ask("GET", "/nothing", timeout_s=PATIENCE_S))[0] == 404


async def test_the_server_s_key_goes_along():
    async with VllmServer() as server:
        await server.client(key="sesame").ask("GET", "/version", timeout_s=PATIENCE_S)
        await server.client().ask("GET", "/version", timeout_s=PATIENCE_S)
    assert "Authorization: Bearer sesame\r\n" in server.heads[0]
    assert "Authorization" not in server.heads[1]


async def test_a_stream_is_read_as_it_comes():
    more = asyncio.Event()
    async with (
        VllmServer(lambda _: (200, [b"one", more, *streamed([b"two"])])) as server,
        server.client().request("POST", "/inference/v1/generate", b'{"a":1}') as response,
    ):
        body = response.body()
        assert await anext(body) == b"data: one\n\n"
        more.set()
        assert b"".join([part async for part in body]) == b"data: two\n\ndata: [DONE]\n\n"


async def test_leaving_the_block_closes_the_connection():
    async with VllmServer(lambda _: (200, [chunk([1]), asyncio.Event()])) as server:
        async with server.client().request("POST", "/inference/v1/generate", b'{"a":1}') as response:
            await anext(response.body())
        await asyncio.wait_for(server.closed.wait(), PATIENCE_S)


async def test_an_answer_that_breaks_off_is_no_answer():
    async with VllmServer(lambda _: (200, [chunk([1]), None])) as server:
        with pytest.raises(ServerGone, match=r"broke off|was closed"):
            await server.client().ask("POST", "/inference/v1/generate", b'{"a":1}', timeout_s=PATIENCE_S)


async def test_nobody_there_is_told_with_the_address():
    async with VllmServer() as server:
        address = server.address
    with pytest.raises(ServerGone, match=f"nobody answers at 127.0.0.1:{address.port}"):
        await HttpClient(address).ask("GET", "/health", timeout_s=PATIENCE_S)


async def test_a_server_that_does_not_answer_in_time_is_told():
    async with VllmServer(lambda _: (200, [asyncio.Event()])) as server:
        with pytest.raises(ServerGone, match=r"no answer within 0\.01 s"):
            await server.client().ask("POST", "/inference/v1/generate", b'{"a":1}', timeout_s=0.01)


async def test_what_is_no_http_is_told():
    async def serve(_, writer):
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        client = HttpClient(Address("127.0.0.1", listener.sockets[0].getsockname()[1]))
        with pytest.raises(ServerGone, match="broke off"):
            await client.ask("GET", "/health", timeout_s=PATIENCE_S)
