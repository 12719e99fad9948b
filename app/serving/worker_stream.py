"""One leg of a request on one worker, as the gateway follows it."""

import asyncio
from collections.abc import Callable

from planes.streams.client import WorkerConnection, WorkerLost
from planes.wire.errors import HeadraceError, Interrupted, InvalidRequest, Rejected
from planes.wire.frames import Done, Failed, FailureKind, Generate, StreamId
from planes.wire.messages import WorkerId


class WorkerRefused(Rejected):
    """The worker would not take the request."""

    def __init__(self, worker: WorkerId, code: str, reason: str) -> None:
        super().__init__(f"worker {worker} refused the request: {reason}")
        self.worker = worker
        self.code = code


class WorkerFailed(Interrupted):
    """The worker began and could not go on."""

    def __init__(self, worker: WorkerId, code: str, reason: str) -> None:
        super().__init__(f"worker {worker} could not go on: {reason}")
        self.worker = worker
        self.code = code


def error_of(failed: Failed, worker: WorkerId) -> InvalidRequest | WorkerRefused | WorkerFailed:
    """What a worker says went wrong, as one of our errors."""
    match failed.kind:
        case FailureKind.INVALID:
            return InvalidRequest(failed.message, param=failed.param, code=failed.code)
        case FailureKind.REJECTED:
            return WorkerRefused(worker, failed.code, failed.message)
        case FailureKind.INTERRUPTED:
            return WorkerFailed(worker, failed.code, failed.message)


class Leg:
    """The sink of one leg (`planes/streams/client.py`): passes payloads on, notes tokens, remembers the end."""

    __slots__ = (
        "_connection",
        "_is_over",
        "_is_quiet",
        "_on_first",
        "_stream",
        "_tokens",
        "_write",
        "ended",
        "ended_at",
        "news",
    )

    def __init__(
        self,
        connection: WorkerConnection,
        tokens: list[int],
        write: Callable[[bytes], None],
        on_first: Callable[[], None] | None = None,
    ) -> None:
        """`tokens` grows by what comes, `write` takes each payload, `on_first` is called once, at the first token."""
        loop = asyncio.get_running_loop()
        self._connection = connection
        self._tokens = tokens
        self._write = write
        self._on_first = on_first
        self._is_quiet = True
        self._is_over = False
        self._stream: StreamId | None = None
        self.news: asyncio.Future[None] = loop.create_future()
        """Done at the first payload, or at the end."""
        self.ended: asyncio.Future[Done | HeadraceError] = loop.create_future()
        self.ended_at = 0.0

    def start(self, request: Generate) -> None:
        """Raises:  WorkerUnreachable."""
        self._stream = self._connection.start(request, self)

    def fail(self, error: HeadraceError) -> None:
        """End this leg because of something else; its worker is told to stop."""
        if not self._is_over:
            self._stop_worker()
            self._end(error)

    def cancel(self) -> None:
        """Nobody waits for this leg any more; nothing happens if it has ended."""
        if not self._is_over:  # `ended` does not tell: whoever is cancelled while awaiting it cancels it too
            self._is_over = True
            self._stop_worker()
            self.ended.cancel()

    async def done(self) -> Done:
        """Wait for the end.  Raises: what it ended with, if not well."""
        outcome = await self.ended
        if isinstance(outcome, HeadraceError):
            raise outcome
        return outcome

    def on_delta(self, payload: bytes, tokens: list[int]) -> None:
        # Runs once per token and request: whatever can wait for the end does.
        self._tokens.extend(tokens)
        if payload:
            self._write(payload)
        if self._is_quiet:
            self._spoke(has_payload=bool(payload))

    def on_done(self, done: Done) -> None:
        self._tokens.extend(done.tokens)
        if self._on_first is not None:
            self._on_first()
        self._end(done)  # whose payload is sent with whatever ends the answer

    def on_failed(self, failed: Failed) -> None:
        self._end(error_of(failed, self._connection.worker))

    def on_lost(self, error: WorkerLost) -> None:
        self._end(error)

    def _spoke(self, *, has_payload: bool) -> None:
        """The first token is here. Quiet ends with the first payload: a formatter may hold text back."""
        if self._on_first is not None:
            self._on_first()
            self._on_first = None
        if has_payload:
            self._is_quiet = False
            if not self.news.done():
                self.news.set_result(None)

    def _end(self, outcome: Done | HeadraceError) -> None:
        self._is_over = True
        self.ended_at = asyncio.get_running_loop().time()
        if not self.ended.done():
            self.ended.set_result(outcome)
        if not self.news.done():
            self.news.set_result(None)

    def _stop_worker(self) -> None:
        if self._stream is not None:
            self._connection.cancel(self._stream)
