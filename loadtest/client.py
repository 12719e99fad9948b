"""A light client for load tests: one answer, streamed or whole, over a kept-alive HTTP/1.1 connection, timed.

Chats, completions, responses and messages.

The clock starts before connecting; the time to first token ends at the first event that carries generated text; tokens
are counted from `usage`. Everything else is left out, because the client shares the machine with what it measures.
"""

import asyncio
import time
from dataclasses import dataclass, field

import msgspec

_HEAD_LIMIT = 65536


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    input_tokens: int = 0
    """Responses and messages have these two words."""
    output_tokens: int = 0


class _Response(msgspec.Struct):
    usage: _Usage | None = None


class _TextDelta(msgspec.Struct):
    text: str = ""


class _Event(msgspec.Struct):
    """One of a stream, or a whole answer."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    type: str = ""
    delta: str | _TextDelta = ""
    response: _Response | None = None


_decode = msgspec.json.Decoder(_Event).decode
_TEXT_DELTAS = ("response.output_text.delta", "content_block_delta")
_FAILURES = ("error", "response.failed")


@dataclass(slots=True)
class Sample:
    """One request as its client saw it. Instants on `time.perf_counter`, gaps in seconds."""

    sent_at: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    ended_at: float = float("nan")
    """When the whole answer was there."""
    first_token_at: float | None = None
    last_token_at: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    text: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """NaN when no token came."""
        return float("nan") if self.first_token_at is None else self.first_token_at - self.sent_at


class Client:
    """One connection; requests on it follow each other."""

    def __init__(self, host: str, port: int, *, keeps_text: bool = False) -> None:
        self._host, self._port = host, port
        self._keeps_text = keeps_text
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> Sample:
        """Send and read to the end. Errors of the server are in the sample; `OSError` is the caller's."""
        payload = msgspec.json.encode(body)
        sample = Sample(time.perf_counter())
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        lines = [f"POST {path} HTTP/1.1", f"host: {self._host}", "content-type: application/json"]
        lines += [f"content-length: {len(payload)}", *(f"{k}: {v}" for k, v in (headers or {}).items()), "", ""]
        self._writer.write("\r\n".join(lines).encode() + payload)
        try:
            await self._read_answer(sample)
            sample.ended_at = time.perf_counter()
            if sample.headers.get("connection", "").lower() == "close":
                self.close()
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            sample.error = sample.error or f"connection lost: {exc!r}"
            self.close()
        return sample

    async def _read_answer(self, sample: Sample) -> None:
        if self._reader is None:
            return
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        sample.status = int(head[0].split(" ", 2)[1])
        sample.headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        if "content-length" in sample.headers:
            self._whole(sample, await self._reader.readexactly(int(sample.headers["content-length"])))
            return
        rest, is_stream = b"", sample.headers.get("content-type", "").startswith("text/event-stream")
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            rest += (await self._reader.readexactly(size + 2))[:-2]
            if is_stream:
                now = time.perf_counter()
                *events, rest = rest.split(b"\n\n")
                for event in events:
                    data = event if event.startswith(b"data: {") else event[event.find(b"\ndata: {") + 1 :]
                    if data.startswith(b"data: {"):
                        self._event(sample, data[6:], now)
        await self._reader.readexactly(2)
        if not is_stream:
            self._whole(sample, rest)

    def _whole(self, sample: Sample, body: bytes) -> None:
        if sample.status != 200:
            sample.error = body.decode(errors="replace") or f"status {sample.status}"
            return
        sample.first_token_at = time.perf_counter()
        self._event(sample, body, sample.first_token_at)

    def _event(self, sample: Sample, data: bytes, now: float) -> None:
        event = _decode(data) if not data.startswith(b'{"error"') else None
        if event is None or event.type in _FAILURES:
            sample.error = data.decode(errors="replace")
            return
        usage = event.usage if event.response is None else event.response.usage
        if usage is not None:
            sample.prompt_tokens = usage.prompt_tokens or usage.input_tokens or sample.prompt_tokens
            sample.completion_tokens = usage.completion_tokens or usage.output_tokens
            details = usage.prompt_tokens_details
            sample.cached_tokens = details.cached_tokens if details else 0
        for choice in event.choices:
            self._said(sample, choice.text if choice.delta is None else choice.delta.content, now)
        if event.delta and event.type in _TEXT_DELTAS:
            self._said(sample, event.delta if isinstance(event.delta, str) else event.delta.text, now)

    def _said(self, sample: Sample, text: str | None, now: float) -> None:
        if not text:
            return
        if sample.first_token_at is None:
            sample.first_token_at = now
        elif sample.last_token_at is not None:
            sample.gaps_s.append(now - sample.last_token_at)
        sample.last_token_at = now
        if self._keeps_text:
            sample.text.append(text)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
