"""Several requests, one for each text of an embeddings request, whose vectors are one answer.

Each is routed and served as any request is: admitted, queued, tried again elsewhere. Its answer is its vector. Few run
at once, so that a long list does not keep others waiting, nor take more sequences than its key may have.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from app.http.merged import Runs
from app.http.response import Headers, StreamedResponse
from app.openai.embeddings import ToEmbed, embedding_body
from app.serving.request import GatewayRequest

MOST_AT_ONCE: Final = 16


async def run_embedded(relay: Runs, jobs: Sequence[GatewayRequest], asked: ToEmbed, response: StreamedResponse) -> None:
    """Answer with the vectors of all jobs, in order, or with the first error."""
    parts = [_Part(response) for _ in jobs]
    waiting = iter(zip(jobs, parts, strict=True))

    async def work() -> None:
        for job, part in waiting:
            await relay.run(job, part)
            if response.is_ended:
                return

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(MOST_AT_ONCE, len(jobs))):
            tasks.create_task(work())
    if response.is_ended:
        return
    prompt_tokens = sum(len(job.prompt) for job in jobs)
    body = embedding_body(jobs[0].format.model, [part.vector for part in parts], asked, prompt_tokens=prompt_tokens)
    response.whole(200, parts[0].headers, body)


class _Part:
    """Where one vector goes: a `Response` for the relay."""

    def __init__(self, response: StreamedResponse) -> None:
        self._response = response
        self.vector = b""
        self.headers: Headers = ()
        self.is_begun = self.is_ended = False

    @property
    def is_gone(self) -> bool:
        return self._response.is_gone

    def begin(self, headers: Headers) -> None:
        raise NotImplementedError("a vector comes in one piece")

    def write(self, payload: bytes) -> None:
        raise NotImplementedError("a vector comes in one piece")

    def end(self, last: bytes = b"") -> None:
        raise NotImplementedError("a vector comes in one piece")

    def keep_alive(self) -> None:
        """Only streams are kept alive."""

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        del status  # what is no answer comes by `fail`
        self.is_begun = self.is_ended = True
        self.vector, self.headers = body, headers

    def fail(self, exc: Exception, headers: Headers) -> None:
        self.is_begun = self.is_ended = True
        if not self._response.is_ended:
            self._response.fail(exc, headers)
