"""One leg of an exchange on one worker: the sink of a stream, and the path of every token."""

from collections.abc import Callable

from app.serving import events as on
from app.serving.errors import leg_error
from planes.streams.client import WorkerConnection, WorkerLost
from planes.wire.frames import Done, Failed, Generate, PrefillLeg, StreamId


class WorkerStream:
    """Tells the exchange of the leg's first payload and of its end; between the two it serves the client itself.

    receive: takes events.  note: takes each Delta's tokens.  write: takes each payload; None: the answer is sent whole.
    """

    __slots__ = (
        "_connection",
        "_is_opening",
        "_is_silent",
        "_is_streaming",
        "_leg",
        "_note",
        "_receive",
        "_stream",
        "_write",
    )

    def __init__(
        self,
        leg: on.LegId,
        connection: WorkerConnection,
        receive: Callable[[on.Event], None],
        note: Callable[[list[int]], None],
        write: Callable[[bytes], None] | None,
    ) -> None:
        self._leg = leg
        self._connection = connection
        self._receive = receive
        self._note = note
        self._write = write or _discard
        self._is_streaming = write is not None
        self._is_silent = False
        """A prefill leg: what it has to say comes with its end."""
        self._is_opening = True
        self._stream: StreamId | None = None

    def start(self, request: Generate) -> None:
        """Raises:  WorkerUnreachable."""
        self._is_silent = isinstance(request.leg, PrefillLeg)
        self._stream = self._connection.start(request, self)

    def cancel(self, on_rest: Callable[[Done], None] | None = None) -> None:
        """Nobody listens any more. Nothing happens if it has ended.

        on_rest: told the worker's last word, if it has one once it has heard of that.
        """
        if self._stream is not None:
            self._connection.cancel(self._stream, on_rest)

    def on_delta(self, payload: bytes, tokens: list[int]) -> None:
        # Runs once per token and request: whatever can wait for the end does.
        if self._is_opening:
            # Until the first payload: a formatter may hold text back.
            self._is_opening = self._is_silent or (self._is_streaming and not payload)
            self._receive(on.LegOutput(self._leg, payload, tokens))
            return
        self._note(tokens)
        if payload:
            self._write(payload)

    def on_done(self, done: Done) -> None:
        self._receive(on.LegDone(self._leg, done))

    def on_failed(self, failed: Failed) -> None:
        self._receive(on.LegFailed(self._leg, leg_error(failed, self._connection.worker)))

    def on_lost(self, error: WorkerLost) -> None:
        self._receive(on.LegFailed(self._leg, error))


def _discard(_: bytes) -> None:
    """An answer in one piece comes with the leg's end."""
