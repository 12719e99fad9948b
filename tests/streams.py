"""Both ends of a stream on a transport that a test looks into."""

import asyncio

import msgspec

from planes.streams.protocol import FrameBuffer, StreamLimits
from planes.wire.frames import Done, FinishReason, Format, Generate, Sampling, StreamId, Usage
from planes.wire.messages import RequestId, WorkerId

WORKER = WorkerId("d0")
LIMITS = StreamLimits(ping_s=1.0, dead_s=3.0, max_frame_bytes=4096, max_unsent_bytes=10_000)
REQUEST = Generate(StreamId(0), RequestId("r"), b"", Sampling(max_tokens=1), Format("chat", "id", "m", 0))
DONE = Done(StreamId(1), FinishReason.STOP, Usage(1, 1, 0))


def frame(message) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(4, "little") + payload


class FakeTransport(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.written = bytearray()
        self.num_writes = 0
        self.unsent = 0
        self.is_closed = False

    def write(self, data):
        self.written += data
        self.num_writes += 1

    def get_write_buffer_size(self):
        return self.unsent

    def is_closing(self):
        return self.is_closed

    def close(self):
        self.is_closed = True

    abort = close

    def sent(self, kind):
        frames = FrameBuffer(1 << 20).feed(bytes(self.written))
        self.written.clear()
        return [msgspec.msgpack.decode(frame, type=kind) for frame in frames]


class FakeSink:
    def __init__(self):
        self.news = []

    def on_delta(self, payload, tokens):
        self.news.append((payload, tokens))

    def on_done(self, done):
        self.news.append(done)

    def on_failed(self, failed):
        self.news.append(failed)

    def on_lost(self, error):
        self.news.append(error)


class FakeHandler:
    def __init__(self):
        self.heard = []

    def generate(self, connection, request):
        self.heard.append(request)

    def cancel(self, connection, stream):
        self.heard.append(stream)

    def release(self, connection, request):
        self.heard.append(request)

    def gone(self, connection):
        self.heard.append("gone")
