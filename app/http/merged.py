"""Several requests, one for each prompt of a completion, whose answers are one: the choices of prompt after prompt.

Each is served as if it had come alone, by whichever workers; its choices are renumbered on their way. That takes a look
at every event, which no other request pays for. One that fails ends them all: half an answer is none.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

from app.http.response import Headers, StreamedResponse
from app.serving.relay import Response
from app.serving.request import GatewayRequest

_INDEX: Final = re.compile(rb'"choices":\[\{"index":(\d+)')
"""In an event; quotes inside texts are escaped, so that no text can look like it."""
_DONE: Final = b"data: [DONE]"


class Runs(Protocol):
    """What `app.serving.relay.Relay` does."""

    async def run(self, request: GatewayRequest, response: Response) -> None: ...


async def run_merged(relay: Runs, jobs: Sequence[GatewayRequest], response: StreamedResponse) -> None:
    """Answer all of `jobs`, which ask for the same, in one answer."""
    merged = _Merged(jobs, response)
    async with asyncio.TaskGroup() as tasks:
        merged.tasks = [tasks.create_task(relay.run(job, part)) for job, part in zip(jobs, merged.parts, strict=True)]
    merged.parts.clear()  # a circle: their answers would wait for the garbage collector


class _Merged:
    """What the parts have in common."""

    def __init__(self, jobs: Sequence[GatewayRequest], response: StreamedResponse) -> None:
        self.response = response
        self.tasks: Sequence[asyncio.Task[None]] = ()
        self.request_id = str(jobs[0].request)
        self.parts = [_Part(self, number * job.sampling.n) for number, job in enumerate(jobs)]
        self.has_failed = False

    def headers(self, headers: Headers) -> Headers:
        """Of the part that speaks first, under the name of the whole."""
        return [(name, self.request_id if name == "x-request-id" else value) for name, value in headers]

    def ended(self, headers: Headers = ()) -> None:
        """A part has ended well."""
        if self.has_failed or not all(part.is_ended for part in self.parts):
            return
        if self.parts[0].body is None:
            self.response.end(b"".join(_last([usage for part in self.parts for usage in part.usages])))
            return
        bodies = [part.body for part in self.parts if part.body is not None]
        self.response.whole(200, self.headers(headers), _merged_body(bodies, self.parts))

    def failed(self, exc: Exception, headers: Headers) -> None:
        if not self.has_failed:
            self.has_failed = True
            self.response.fail(exc, self.headers(headers))
            for task, part in zip(self.tasks, self.parts, strict=False):
                if not part.is_ended:
                    task.cancel()


class _Part:
    """Where one request's answer goes: a `Response` for the relay.  first: number of its first choice."""

    def __init__(self, merged: _Merged, first: int) -> None:
        self._merged = merged
        self._first = first
        self.first = first
        self.is_begun = self.is_ended = False
        self.body: dict[str, Any] | None = None
        """Of an answer in one piece."""
        self.usages: list[dict[str, Any]] = []
        """The event that tells it, if the client wants one."""

    @property
    def is_gone(self) -> bool:
        return self._merged.has_failed or self._merged.response.is_gone

    def begin(self, headers: Headers) -> None:
        self.is_begun = True
        if not self._merged.response.is_begun:
            self._merged.response.begin(self._merged.headers(headers))

    def write(self, payload: bytes) -> None:
        if not self._merged.has_failed:
            self._merged.response.write(self._renumbered(payload))

    def end(self, last: bytes = b"") -> None:
        self.is_ended = True
        if self._merged.has_failed:
            return
        kept: list[bytes] = []
        for event in last.split(b"\n\n"):
            if event.startswith(b"data: {") and b'"choices":[]' in event:
                self.usages.append(msgspec.json.decode(event.removeprefix(b"data: ")))
            elif event and event != _DONE:
                kept.append(event + b"\n\n")
        if kept:
            self._merged.response.write(self._renumbered(b"".join(kept)))
        self._merged.ended()

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        del status  # what is no answer comes by `fail`
        self.is_begun = self.is_ended = True
        self.body = msgspec.json.decode(body)
        self._merged.ended(headers)

    def fail(self, exc: Exception, headers: Headers) -> None:
        self.is_begun = self.is_ended = True
        self._merged.failed(exc, headers)

    def keep_alive(self) -> None:
        if not self._merged.response.is_ended:
            self._merged.response.keep_alive()

    def _renumbered(self, events: bytes) -> bytes:
        if not self._first:
            return events
        return _INDEX.sub(lambda found: b'"choices":[{"index":%d' % (int(found[1]) + self._first), events)


def _merged_body(bodies: Sequence[dict[str, Any]], parts: Sequence[_Part]) -> bytes:
    choices = [
        choice | {"index": choice["index"] + part.first}
        for body, part in zip(bodies, parts, strict=True)
        for choice in body["choices"]
    ]
    return msgspec.json.encode(bodies[0] | {"choices": choices, "usage": _sum([body["usage"] for body in bodies])})


def _last(events: Sequence[dict[str, Any]]) -> list[bytes]:
    usage = (
        [b"data: " + msgspec.json.encode(events[0] | {"usage": _sum([event["usage"] for event in events])}) + b"\n\n"]
        if events
        else []
    )
    return [*usage, _DONE + b"\n\n"]


def _sum(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of OpenAI's usage, the details too."""
    total: dict[str, Any] = {}
    for usage in usages:
        for name, value in usage.items():
            if isinstance(value, dict):
                total[name] = _sum([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + (value or 0)
    return total
