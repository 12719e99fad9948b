"""A light streaming client for load tests: one chat or completion over a kept-alive HTTP/1.1 connection, timed.

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
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Sample:
    """One request as its client saw it. Instants on `time.perf_counter`, gaps in seconds."""

    sent_at: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
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
            body = await self._reader.readexactly(int(sample.headers["content-length"]))
            if sample.status != 200:
                sample.error = body.decode(errors="replace")
            else:
                self._event(sample, body, time.perf_counter())
            return
        rest = b""
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            data = rest + (await self._reader.readexactly(size + 2))[:-2]
            now = time.perf_counter()
            *events, rest = data.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    self._event(sample, event[6:], now)
        await self._reader.readexactly(2)

    def _event(self, sample: Sample, data: bytes, now: float) -> None:
        if data.startswith(b'{"error"'):
            sample.error = data.decode(errors="replace")
            return
        event = _decode(data)
        if event.usage is not None:
            sample.prompt_tokens = event.usage.prompt_tokens
            sample.completion_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            sample.cached_tokens = details.cached_tokens if details else 0
        for choice in event.choices:
            text = choice.text if choice.delta is None else choice.delta.content
            if not text:
                continue
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
