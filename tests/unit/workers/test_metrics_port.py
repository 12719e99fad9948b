import asyncio

import pytest

from planes.wire.errors import UnusableSetting
from workers.metrics_port import MetricsPort


async def asked(port, head):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.fixture
async def listening():
    listener = MetricsPort(lambda: b"up 1\n", is_open=True)
    yield await listener.listen("127.0.0.1", 0)
    listener.close()


@pytest.mark.parametrize(
    ("line", "status", "body"),
    [
        (b"GET /metrics HTTP/1.1", b"200", b"up 1\n"),
        (b"GET /metrics?x=1 HTTP/1.0", b"200", b"up 1\n"),
        (b"HEAD /metrics HTTP/1.1", b"200", b""),
        (b"GET /live HTTP/1.1", b"200", b'{"status":"ok"}'),
        (b"GET / HTTP/1.1", b"404", b"/metrics and /live are possible\n"),
        (b"POST /metrics HTTP/1.1", b"405", b"GET is possible\n"),
        (b"nonsense", b"405", b"GET is possible\n"),
    ],
)
async def test_two_paths_are_answered(listening, line, status, body):
    head, _, told = (await asked(listening, line + b"\r\nhost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert (head.split(b" ")[1], told) == (status, body)


@pytest.mark.parametrize(
    ("shown", "status"),
    [
        (b"", b"401"),
        (b"authorization: Bearer another\r\n", b"401"),
        (b"authorization: Basic s3cr3t\r\n", b"401"),
        (b"x-authorization: Bearer s3cr3t\r\n", b"401"),
        (b"Authorization:bearer  s3cr3t \r\n", b"200"),
        (b"accept: */*\r\nauthorization: Bearer s3cr3t\r\n", b"200"),
    ],
)
async def test_metrics_ask_for_the_token_and_life_does_not(shown, status):
    listener = MetricsPort(lambda: b"up 1\n", token=lambda: "s3cr3t")
    port = await listener.listen("127.0.0.1", 0)
    told = await asked(port, b"GET /metrics HTTP/1.1\r\n" + shown + b"\r\n")
    assert told.split(b" ")[1] == status
    assert (b"up 1" in told) == (status == b"200")
    assert b" 200 OK" in await asked(port, b"GET /live HTTP/1.1\r\n" + shown + b"\r\n")
    listener.close()


async def test_without_a_token_nobody_reads_what_is_not_open():
    listener = MetricsPort(lambda: b"up 1\n")
    port = await listener.listen("127.0.0.1", 0)
    told = await asked(port, b"GET /metrics HTTP/1.1\r\nauthorization: Bearer \r\n\r\n")
    assert told.startswith(b"HTTP/1.1 401 ")
    assert told.endswith(b"it needs --metrics-token-file\n")
    assert b" 200 OK" in await asked(port, b"GET /live HTTP/1.1\r\n\r\n")
    listener.close()


async def test_an_endless_head_is_not_answered(listening):
    assert await asked(listening, b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 4000) == b""


async def test_a_taken_port_is_named(listening):
    with pytest.raises(UnusableSetting, match="--metrics-port"):
        await MetricsPort(lambda: b"").listen("127.0.0.1", listening)
