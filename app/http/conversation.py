"""The prompt of a response: what it goes on from and refers to is loaded, and put in front of its own items."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from app.gateway import Gateway
from app.http.body import BodyLease
from app.http.intake import max_body_bytes, prepared_request
from app.http.routes.generate import Admitted
from app.keys.tenant import Tenant
from app.openai.decode import check_count
from app.openai.responses.bodies import Item
from app.openai.responses.items import known_items
from app.openai.responses.request import ResponseRequest
from app.openai.schema import ParsedRequest
from app.prompt.prepare import ContextExceeded
from app.responses.store import items_by_id
from app.serving.request import GatewayRequest
from planes.wire.response_object import response_of

_MAX_REFERENCES: Final = 256
"""In one request. Each may be to a response of its own, which is read for it."""


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """What stands before a request's own items. items: JSON of its own, those that it refers to in their place.

    num_bytes: of all that.
    """

    parsed: ParsedRequest
    chain: list[str]
    items: bytes
    num_bytes: int


async def load_conversation(
    gateway: Gateway, asked: ResponseRequest, tenant: Tenant, lease: BodyLease, num_bytes: int, *, is_stored: bool
) -> Conversation:
    """With what the request goes on from, and what it refers to, loaded.  Raises:  HeadraceError."""
    chain: list[str] = []
    before: list[bytes] = []
    num_before = 0
    limit = max_body_bytes(gateway)
    if asked.previous is not None:
        await gateway.responses.check("'previous_response_id'")
        chain, before, num_before = await gateway.responses.conversation(
            tenant.name, asked.previous, max_bytes=limit - num_bytes
        )
        lease.grow_to(num_bytes + num_before)
    wanted = set(asked.references)
    # What is sent under an id that is also referred to is exchanged, too, and so it counts.
    meant = [item.id for item in asked.input.items if item.id and item.id in wanted]
    referred, num_referred = await _referred(gateway, meant, tenant, lease, num_bytes + num_before, limit)
    num_loaded = num_before + num_referred
    own = [referred.get(item.id or "", raw) for item, raw in zip(asked.input.items, asked.input.raw, strict=True)]
    items = b"[" + b",".join(own) + b"]"
    num_items = num_before + len(items)

    def completed() -> ParsedRequest:
        earlier = [item for one in before for item in known_items(one)]
        known: dict[str, Item] = {name: known_items(b"[%b]" % raw)[0] for name, raw in referred.items()}
        return asked.completed(earlier, known, is_stored=is_stored, num_bytes=num_loaded)

    parsed = await gateway.preprocessor.run(completed, num_bytes=num_bytes + num_loaded)
    return Conversation(parsed, chain, items, num_items)


async def _referred(
    gateway: Gateway, references: Sequence[str], tenant: Tenant, lease: BodyLease, num_bytes: int, limit: int
) -> tuple[dict[str, bytes], int]:
    """Each counts, in `lease` and against the limit, as often as it is referred to.

    Args:  num_bytes: of what is there already.  limit: of that and of all these items.
    Returns:  JSON of the items of these ids, by id; their bytes.  Raises:  HeadraceError.
    """
    check_count("input", len(references), _MAX_REFERENCES, "item references")
    times = Counter(references)
    beside: dict[str | None, list[str]] = {}
    for name in times:
        beside.setdefault(response_of(name), []).append(name)
    referred: dict[str, bytes] = {}
    num_referred = 0
    for names in beside.values():
        lists = await gateway.responses.items_beside(tenant.name, names[0])
        found = await gateway.preprocessor.run(items_by_id, lists, names, num_bytes=sum(map(len, lists)))
        num_referred += sum([len(raw) * times[name] for name, raw in found.items()])
        check_count("input", num_referred, limit - num_bytes, "bytes of items that are referred to")
        lease.grow_to(num_bytes + num_referred)
        referred |= found
    return referred, num_referred


async def prepared_response(
    gateway: Gateway, asked: ResponseRequest, parsed: ParsedRequest, admitted: Admitted, arrived_at: float
) -> GatewayRequest:
    """With `truncation: auto`, without as many of the first turns as have no room."""

    async def prepared(messages: tuple[dict[str, Any], ...]) -> GatewayRequest:
        return await prepared_request(
            gateway,
            msgspec.structs.replace(parsed, messages=messages),
            headers=admitted.headers,
            tenant=admitted.tenant,
            request_id=admitted.request_id,
            arrived_at=arrived_at,
        )

    async def prepared_from(turn: int) -> GatewayRequest:
        return await prepared((*parsed.messages[:start], *parsed.messages[turn:]))

    try:
        return await prepared(parsed.messages)
    except ContextExceeded:
        start, turns = _later_turns(parsed.messages) if asked.is_truncated else (0, [])
        if not turns:
            raise
    low, high = 0, len(turns) - 1
    while low < high:
        middle = (low + high) // 2
        try:
            await prepared_from(turns[middle])
        except ContextExceeded:
            low = middle + 1
        else:
            high = middle
    return await prepared_from(turns[low])


def _later_turns(messages: Sequence[dict[str, Any]]) -> tuple[int, list[int]]:
    """Where what instructs the model ends, and where each turn but the first begins."""
    start = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return start, [at for at, message in enumerate(messages) if message["role"] == "user" and at > start]
