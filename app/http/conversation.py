"""The prompt of a response: what it goes on from and refers to is loaded, and put in front of its own items."""

from dataclasses import dataclass
from typing import Any

import msgspec

from app.gateway import Gateway
from app.http.body import BodyLease
from app.http.intake import max_body_bytes, prepared_request
from app.http.routes.generate import Admitted
from app.keys.tenant import Tenant
from app.openai.responses.bodies import Item
from app.openai.responses.items import known_items
from app.openai.responses.request import ResponseRequest
from app.openai.schema import ParsedRequest
from app.prompt.prepare import ContextExceeded
from app.serving.request import GatewayRequest


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
    if asked.previous is not None:
        limit = max_body_bytes(gateway) - num_bytes
        await gateway.responses.check("'previous_response_id'")
        chain, before, num_before = await gateway.responses.conversation(tenant.name, asked.previous, max_bytes=limit)
        lease.grow_to(num_bytes + num_before)
    referred = {name: await gateway.responses.item(tenant.name, name) for name in asked.references}
    own = [referred.get(item.id or "", raw) for item, raw in zip(asked.input.items, asked.input.raw, strict=True)]
    items = b"[" + b",".join(own) + b"]"
    num_items = num_before + len(items)

    def completed() -> ParsedRequest:
        earlier = [item for one in before for item in known_items(one)]
        known: dict[str, Item] = {name: known_items(b"[%b]" % raw)[0] for name, raw in referred.items()}
        return asked.completed(earlier, known, is_stored=is_stored, num_bytes=num_before)

    parsed = await gateway.preprocessor.run(completed, num_bytes=num_bytes + num_before)
    return Conversation(parsed, chain, items, num_items)


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

    try:
        return await prepared(parsed.messages)
    except ContextExceeded:
        shorter = _shorter(parsed.messages) if asked.is_truncated else []
        if not shorter:
            raise
    low, high = 0, len(shorter) - 1
    while low < high:
        middle = (low + high) // 2
        try:
            await prepared(shorter[middle])
        except ContextExceeded:
            low = middle + 1
        else:
            high = middle
    return await prepared(shorter[low])


def _shorter(messages: tuple[dict[str, Any], ...]) -> list[tuple[dict[str, Any], ...]]:
    """The same conversation from each of its later turns on, longest first; what instructs the model stays."""
    start = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns = [at for at, message in enumerate(messages) if message["role"] == "user" and at > start]
    return [(*messages[:start], *messages[at:]) for at in turns]
