"""HTTP/1 by hand, for what no client library would send or tell."""

import asyncio

MAX_UNSENT = 100_000
"""Bytes of one answer that the servers of these tests keep for a slow client."""


def post(version="1.1", method="POST", body=b"", extra=b""):
    head = f"{method} / HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
    return head + extra + b"\r\n" + body


async def read_head(reader):
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    status, *lines = head.decode().strip().split("\r\n")
    return status.split()[1], dict(line.split(": ", 1) for line in lines)


async def read_chunks(reader):
    chunks = []
    while True:
        size = int(await asyncio.wait_for(reader.readline(), 60), 16)
        chunks.append(await reader.readexactly(size))
        assert await reader.readexactly(2) == b"\r\n"
        if not size:
            return chunks[:-1]


async def until(holds):
    """Wait for something that no event tells of."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
