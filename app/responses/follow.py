"""The stream of a background response, from any event on, wherever it runs."""

from collections.abc import AsyncIterator
from typing import Final

from app.responses.background import Background
from app.responses.store import ResponseStore
from planes.events import EventPlaneUnavailable
from planes.wire.errors import InvalidRequest
from planes.wire.response_object import response_event

_QUIET_S: Final = 2.0
"""So long without news it is asked whether somebody still runs it."""
_KINDS: Final = {"completed": "response.completed", "failed": "response.failed"}
"""Of the last event; a response that was cancelled is incomplete."""


class NotStreamed(InvalidRequest):
    """Its events are not kept."""

    code = "not_streamed"

    def __init__(self, response: str) -> None:
        super().__init__(
            f"The response '{response}' has no stream: only one that was created with 'background' and 'stream' has.",
            param="stream",
        )


async def follow(
    store: ResponseStore, background: Background, tenant: str, response: str, *, after: int
) -> AsyncIterator[bytes]:
    """The events whose numbers are larger than `after`, as they come, to the end; b"" while there are none.

    Raises:  ResponseNotFound, NotKept, at any time.
    """
    held, number, seq = b"", 0, 0
    async with store.changes(tenant, response) as changes:
        is_final = False
        while True:
            found = await store.events(tenant, response, seq)
            if found is not None:
                piece, seq = found
                *whole, held = (held + piece).split(b"\n\n")
                news = b"".join([event + b"\n\n" for place, event in enumerate(whole, number) if place > after])
                number += len(whole)
                if news:
                    yield news
                if not piece:
                    break
            elif is_final:
                break
            else:
                try:
                    await changes.next(_QUIET_S)
                except EventPlaneUnavailable:
                    yield b""
                    is_final = (await background.find(tenant, response)).is_final
    record = await store.get(tenant, response)
    last = number if record.num_events is None else record.num_events
    if last > after:
        yield response_event(_KINDS.get(record.status, "response.incomplete"), last, record.body)
