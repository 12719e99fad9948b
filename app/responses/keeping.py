"""The answer to a client whose response is kept: stored before its last bytes are sent, so that whoever has read them
finds it.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from app.responses.ending import failed_event, next_number, taken_apart
from app.serving import effects as do
from app.serving.relay import Response
from planes.wire.frames import Format

Keep = Callable[[bytes], Awaitable[None]]
"""Stores a response, given its JSON. Raises nothing: the answer goes out all the same."""


class KeepingResponse:
    """In front of the client's own. What a stream says goes through; its end waits for `settle`.

    headers: added to the answer's own.  keep: None: the response is not kept.
    """

    def __init__(
        self, client: Response, layout: Format, *, headers: Sequence[tuple[str, str]] = (), keep: Keep | None = None
    ) -> None:
        self._client = client
        self._layout = layout
        self._headers = list(headers)
        self._keep = keep
        self._latest = b""
        self._due: Callable[[], None] | None = None
        """Sends the end. Knows nothing of this object, which would keep what was asked from being freed."""
        self._body = b""
        self.is_ended = False

    @property
    def is_gone(self) -> bool:
        return self._client.is_gone

    @property
    def is_begun(self) -> bool:
        return self._client.is_begun or self.is_ended

    def begin(self, headers: do.Headers) -> None:
        self._client.begin([*headers, *self._headers])

    def write(self, payload: bytes) -> None:
        self._latest = payload
        self._client.write(payload)

    def end(self, last: bytes = b"") -> None:
        self.is_ended = True
        if self._keep is not None:
            self._body = taken_apart(last).body
        self._due = partial(self._client.end, last)

    def whole(self, status: int, headers: do.Headers, body: bytes) -> None:
        self.is_ended = True
        self._body = body
        self._due = partial(self._client.whole, status, [*headers, *self._headers], body)

    def fail(self, exc: Exception, headers: do.Headers) -> None:
        """What failed is not kept."""
        self.is_ended = True
        if self._client.is_begun:
            self._client.end(failed_event(self._layout, exc, next_number(self._latest)))
        else:
            self._client.fail(exc, headers)

    def keep_alive(self) -> None:
        if not self.is_ended:
            self._client.keep_alive()

    async def settle(self) -> None:
        """Store the response and send the end."""
        if self._due is None:
            return
        if self._keep is not None:
            await self._keep(self._body)
        self._due()
