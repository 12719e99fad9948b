"""A gateway that does nothing: each request goes to the next worker as it came, and its answer back as it comes.

    python relay.py PORT URL ...

No tokens, no routing, no limits, no log: two HTTP exchanges, parsed by the library and on the event loop that Headrace
uses. What it costs is the least that a gateway in Python can cost, so it is the floor of Headrace's figures.
"""

import asyncio
import sys
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import uvloop
from httptools import HttpRequestParser, HttpResponseParser

_HEAD = b"POST %b HTTP/1.1\r\nhost: worker\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"


class Worker:
    """One upstream, with its connections that are not in use."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port or 80
        self.idle: deque[Upstream] = deque()

    async def dial(self, request: bytes, client: "Client") -> None:
        """Send a request over a new connection."""
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: Upstream(self), self._host, self._port)
        upstream.send(request, client)


class Upstream(asyncio.Protocol):
    """A connection to a worker: answers one client at a time."""

    _transport: Any

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._parser = HttpResponseParser(self)
        self._client: Client | None = None
        self._has_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self, request: bytes, client: "Client") -> None:
        self._client, self._parser, self._has_ended = client, HttpResponseParser(self), False
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if self._client is not None:
            self._client.transport.write(data)
        if self._has_ended:
            self._client = None
            self._worker.idle.append(self)

    def on_message_complete(self) -> None:
        """Of the parser."""
        self._has_ended = True


class Client(asyncio.Protocol):
    """A connection of a client: one request at a time."""

    transport: Any
    _url = b""

    def __init__(self, workers: deque[Worker]) -> None:
        self._workers = workers
        self._parser = HttpRequestParser(self)
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        """Of the parser."""
        self._url = url

    def on_body(self, body: bytes) -> None:
        """Of the parser."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Of the parser."""
        body, self._body = b"".join(self._body), []
        self._workers.rotate()
        worker, request = self._workers[0], _HEAD % (self._url, len(body), body)
        if worker.idle:
            worker.idle.pop().send(request, self)
        else:
            self._sending = asyncio.get_running_loop().create_task(worker.dial(request, self))


async def main(port: int, urls: list[str]) -> None:
    workers = deque(map(Worker, urls))
    server = await asyncio.get_running_loop().create_server(lambda: Client(workers), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2:]))
