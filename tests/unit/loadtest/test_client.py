"""The load client against answers as other people's servers frame them."""

import asyncio

import pytest

from loadtest.client import Client

USAGE = b'{"prompt_tokens":3,"completion_tokens":2}'
CHAT = (
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"delta":{"content":"b"}}]}\n\n'
    b'data: {"choices":[],"usage":' + USAGE + b"}\n\ndata: [DONE]\n\n"
)
MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":2}}\n\n'
)
FAILED = b'event: error\ndata: {"type":"error","error":{"message":"no"}}\n\n'
STREAM = b"content-type: text/event-stream"


async def answered(*answers):
    """Samples of requests to a server that says these bytes, one after the other for each request."""
    told, left = iter(answers), asyncio.Event()

    async def serve(reader, writer):
        while await reader.read(65536):
            for part in next(told):
                writer.write(part)
                await writer.drain()
        writer.close()
        await writer.wait_closed()
        left.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client("127.0.0.1", server.sockets[0].getsockname()[1], keeps_text=True)
    samples = [await client.post("/", {}) for _ in answers]
    client.close()
    await left.wait()
    server.close()
    return samples


def chunked(body, size, kind=STREAM):
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return [b"HTTP/1.1 200 OK\r\n" + kind + b"\r\ntransfer-encoding: chunked\r\n\r\n"] + [
        b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""]
    ]


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(("body", "text"), [(CHAT, ["a", "b"]), (MESSAGES, ["a"])])
def test_events_are_read_however_they_are_cut(body, text, size):
    (sample,) = asyncio.run(answered(chunked(body, size)))
    assert (sample.error, sample.text, sample.completion_tokens) == ("", text, 2)
    assert sample.ended_at >= sample.first_token_at >= sample.sent_at


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_whole_answer_may_come_in_chunks(is_chunked):
    body = b'{"choices":[{"message":{"content":"ab"}}],"usage":' + USAGE + b"}"
    whole = [b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)]
    (sample,) = asyncio.run(answered(chunked(body, 9, b"content-type: application/json") if is_chunked else whole))
    assert (sample.error, sample.completion_tokens) == ("", 2)
    assert sample.first_token_at is not None


def test_failures_are_told_and_the_connection_goes_on():
    refused = [b"HTTP/1.1 503 No\r\ncontent-length: 4\r\n\r\nbusy"]
    samples = asyncio.run(answered(refused, chunked(FAILED, 1000), chunked(CHAT, 1000)))
    assert [bool(sample.error) for sample in samples] == [True, True, False]
    assert samples[0].error == "busy"
