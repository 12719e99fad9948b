"""What is kept of responses, for any gateway to find: the answer, the items that it answered, what it goes on from.

    {tenant}.{response}.response    StoredResponse
    {tenant}.{response}.input       JSON list of the request's own items
    {tenant}.{response}.events.{n}  pieces of a background response's stream, in order; an empty one ends it

The tenant is part of the key, so that another's response is not there. Input goes first: where the response is, so is
what belongs to it, and what the store has dropped to make room is missing as a whole.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, Final, Protocol

import msgspec
import structlog

from planes.bucket import NoJetStream, ObjectMissing, StoreUnusable
from planes.events import EventPlaneUnavailable
from planes.wire.errors import InvalidRequest, Rejected
from planes.wire.names import subject_token
from planes.wire.response_object import FINAL, response_of
from planes.wire.unreadable import UNREADABLE

_log = structlog.get_logger()

_RESPONSE_ID: Final = re.compile(r"resp_[0-9a-f]{8,64}")
MAX_CHAIN: Final = 256
"""Responses that one goes on from, one after the other."""


class ResponseNotFound(InvalidRequest):
    """Never kept, no longer kept, or another tenant's: which of them is not told."""

    code = "not_found"

    def __init__(self, response: str) -> None:
        super().__init__(
            f"Response with id '{response[:100]}' not found: it was not stored, is no longer kept, or is not yours."
        )


class PreviousNotFound(InvalidRequest):
    """The same, of a response that another is to go on from."""

    code = "previous_response_not_found"

    def __init__(self, response: str) -> None:
        super().__init__(
            f"Previous response with id '{response[:100]}' not found: it was not stored, is no longer kept, or is not "
            "yours. Send the conversation's items in 'input'.",
            param="previous_response_id",
        )


class ConversationTooLong(InvalidRequest):
    """More responses, or more bytes of them, than are put in front of one request."""

    code = "conversation_too_long"

    def __init__(self, count: int, limit: int, what: str) -> None:
        super().__init__(
            f"The conversation before has {count} {what} and the limit is {limit}; send the items that matter in "
            "'input', without 'previous_response_id'.",
            param="previous_response_id",
        )


class ItemNotFound(InvalidRequest):
    """Not among the items of a response that is kept and is the tenant's."""

    code = "item_not_found"

    def __init__(self, item: str) -> None:
        super().__init__(
            f"Item with id '{item[:100]}' not found: items are kept with stored responses; send the item itself.",
            param="input",
        )


class NotKept(Rejected):
    """Responses cannot be kept now, or those that are cannot be read."""

    code = "responses_not_kept"

    def __init__(self, what: str, reason: str) -> None:
        self._message = f"{what} needs the store of responses, which is in NATS JetStream and cannot be used now"
        super().__init__(f"{self._message}: {reason}", retry_after_s=1.0)

    def for_client(self) -> str:
        return f"{self._message}."


class StoredResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """body: the response's JSON, as its client gets it."""

    body: bytes
    chain: list[str] = []
    """The responses that it goes on from, the first one first."""
    num_bytes: int = 0
    """Of all their items and its own: what whoever goes on from it must read."""
    gateway: str = ""
    """Where it runs in the background; empty if it does not (any more)."""
    is_background: bool = False
    is_streamed: bool = False
    """Whether its events are kept."""
    num_events: int | None = None
    """How many of them there were before its last one; None: not known."""

    @property
    def status(self) -> str:
        """In OpenAI's words."""
        return msgspec.json.decode(self.body, type=_Status).status

    @property
    def is_final(self) -> bool:
        return self.status in FINAL


class _Status(msgspec.Struct, frozen=True):
    status: str


class _Output(msgspec.Struct, frozen=True):
    output: msgspec.Raw


class Changes(Protocol):
    """What `planes.events.Inbox` does."""

    async def next(self, timeout_s: float) -> Any: ...


class Values(Protocol):
    """What `planes.keyed.KeyedStore` does."""

    async def check(self) -> None: ...
    async def get(self, key: str) -> bytes: ...
    async def put(self, key: str, value: bytes) -> None: ...
    async def delete(self, prefix: str) -> None: ...
    async def next(self, prefix: str, after: int = 0) -> tuple[bytes, int]: ...
    def changes(self, prefix: str) -> AbstractAsyncContextManager[Changes]: ...
    @property
    def piece_bytes(self) -> int: ...
    @property
    def max_value_bytes(self) -> int: ...


class ResponseStore:
    """The responses of one tenant are named by tenant and id. Every method raises NotKept without JetStream."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self.max_bytes = values.max_value_bytes
        """Of one response, and of one response's events."""

    async def check(self, what: str) -> None:
        """That responses can be kept now, which `what` needs."""
        with _available(what):
            await self._values.check()

    async def get(self, tenant: str, response: str) -> StoredResponse:
        """Raises:  ResponseNotFound."""
        return await self._record(_key(tenant, response), response)

    async def save(self, tenant: str, response: str, record: StoredResponse, items: bytes | None = None) -> None:
        """Args:  items: JSON of the request's own; None: they are there.  Raises:  ValueTooLarge."""
        key = _key(tenant, response)
        with _available("'store'"):
            if items is not None:
                await self._values.put(f"{key}.input", items)
            await self._values.put(f"{key}.response", msgspec.msgpack.encode(record))

    async def delete(self, tenant: str, response: str) -> None:
        """Raises:  ResponseNotFound."""
        await self.get(tenant, response)
        with _available("DELETE"):
            await self._values.delete(_key(tenant, response))

    async def conversation(self, tenant: str, response: str, *, max_bytes: int) -> tuple[list[str], list[bytes], int]:
        """What is said up to the end of a response.

        Returns:  the ids of its responses; JSON lists of items, in order; bytes of these.
        Raises:  PreviousNotFound, ConversationTooLong; InvalidRequest for one that is not finished.
        """
        try:
            record = await self.get(tenant, response)
        except ResponseNotFound as exc:
            raise PreviousNotFound(response) from exc
        if record.status not in ("completed", "incomplete"):
            raise InvalidRequest(
                f"Previous response '{response}' is {record.status}; only one that has ended can be gone on from.",
                param="previous_response_id",
            )
        if record.num_bytes > max_bytes:
            raise ConversationTooLong(record.num_bytes, max_bytes, "bytes")
        ids = [*record.chain, response]
        if len(ids) > MAX_CHAIN:
            raise ConversationTooLong(len(ids), MAX_CHAIN, "responses")
        links = await asyncio.gather(*[self._link(tenant, one) for one in ids])
        return ids, [items for link in links for items in link], record.num_bytes

    async def items(self, tenant: str, response: str) -> list[bytes]:
        """JSON lists of the items that a response answered, those of the conversation before too.

        Raises:  ResponseNotFound.
        """
        record = await self.get(tenant, response)
        before = await asyncio.gather(*[self._link(tenant, one) for one in record.chain])
        return [*(items for link in before for items in link), await self._input(tenant, response)]

    async def items_beside(self, tenant: str, item: str) -> Sequence[bytes]:
        """JSON lists of the items of the response that an item is of, by its id.  Raises:  ItemNotFound."""
        response = response_of(item)
        if response is None:
            raise ItemNotFound(item)
        try:
            return await self._link(tenant, response)
        except (ResponseNotFound, PreviousNotFound) as exc:
            raise ItemNotFound(item) from exc

    async def append(self, tenant: str, response: str, place: int, events: bytes) -> None:
        """The next piece of a stream; an empty one ends it."""
        with _available("a background response"):
            await self._values.put(f"{_key(tenant, response)}.events.{place}", events)

    async def events(self, tenant: str, response: str, after: int) -> tuple[bytes, int] | None:
        """The first piece after the one of this number, and its number; None: there is none yet."""
        with _available("a stream"):
            try:
                return await self._values.next(f"{_key(tenant, response)}.events", after)
            except ObjectMissing:
                return None

    @property
    def piece_bytes(self) -> int:
        """How long a piece of a stream may be."""
        return self._values.piece_bytes

    @asynccontextmanager
    async def changes(self, tenant: str, response: str) -> AsyncIterator[Changes]:
        """Hears whenever something of a response is written."""
        with _available("waiting for a response"):
            async with self._values.changes(_key(tenant, response)) as changes:
                yield changes

    async def _link(self, tenant: str, response: str) -> Sequence[bytes]:
        """What a response answered, and its answer."""
        try:
            record = await self.get(tenant, response)
            return await self._input(tenant, response), bytes(msgspec.json.decode(record.body, type=_Output).output)
        except ResponseNotFound as exc:
            raise PreviousNotFound(response) from exc

    async def _input(self, tenant: str, response: str) -> bytes:
        with _available("reading a response"):
            try:
                return await self._values.get(f"{_key(tenant, response)}.input")
            except ObjectMissing as exc:
                raise ResponseNotFound(response) from exc

    async def _record(self, key: str, response: str) -> StoredResponse:
        with _available("reading a response"):
            try:
                return msgspec.msgpack.decode(await self._values.get(f"{key}.response"), type=StoredResponse)
            except ObjectMissing as exc:
                raise ResponseNotFound(response) from exc
            except UNREADABLE as exc:
                _log.warning("response.malformed", response=response, reason=str(exc))
                raise ResponseNotFound(response) from exc


def items_by_id(lists: Iterable[bytes], ids: Collection[str]) -> dict[str, bytes]:
    """JSON of the items of these ids, out of JSON lists of items; of several of one id the first.

    Raises:  ItemNotFound.
    """
    found: dict[str, bytes] = {}
    for listed in lists:
        for raw in msgspec.json.decode(listed, type=list[msgspec.Raw]):
            name = msgspec.json.decode(raw, type=_Identified).id
            if name is not None and name in ids:
                found.setdefault(name, bytes(raw))
    for name in ids:
        if name not in found:
            raise ItemNotFound(name)
    return found


class _Identified(msgspec.Struct, frozen=True):
    id: str | None = None


def _key(tenant: str, response: str) -> str:
    """Raises:  ResponseNotFound for what is no id of ours, and so may be no part of a subject."""
    if _RESPONSE_ID.fullmatch(response) is None:
        raise ResponseNotFound(response)
    return f"{subject_token(tenant)}.{response}"


@contextmanager
def _available(what: str) -> Any:
    try:
        yield
    except (EventPlaneUnavailable, NoJetStream, StoreUnusable) as exc:
        raise NotKept(what, str(exc)) from exc
