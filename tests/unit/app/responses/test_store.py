import msgspec
import pytest

from app.responses.store import (
    MAX_CHAIN,
    ConversationTooLong,
    ItemNotFound,
    NotKept,
    PreviousNotFound,
    ResponseNotFound,
    ResponseStore,
    StoredResponse,
    items_by_id,
)
from planes.events import EventPlaneUnavailable
from planes.wire.errors import InvalidRequest
from tests.fakes import FakeValues


def identifier(number):
    return f"resp_{number:024x}"


def body(number, status="completed"):
    item = {"type": "message", "id": f"msg_{number:024x}_0", "content": str(number)}
    return msgspec.json.encode({"id": identifier(number), "status": status, "output": [item]})


async def stored(*numbers, tenant="a", status="completed"):
    """A conversation of so many responses."""
    store, chain, num_bytes = ResponseStore(FakeValues()), [], 0
    for number in numbers:
        num_bytes += 10
        record = StoredResponse(body(number, status), chain=list(chain), num_bytes=num_bytes)
        await store.save(tenant, identifier(number), record, b'[{"role":"user","content":"%d?"}]' % number)
        chain.append(identifier(number))
    return store


async def test_a_conversation_is_all_that_was_said_in_order():
    store = await stored(1, 2)
    ids, lists, num_bytes = await store.conversation("a", identifier(2), max_bytes=100)
    assert ids == [identifier(1), identifier(2)]
    assert [msgspec.json.decode(one)[0]["content"] for one in lists] == ["1?", "1", "2?", "2"]
    assert num_bytes == 20


async def test_another_tenants_response_is_not_there():
    store = await stored(1, tenant="a")
    for tenant in ("b", "", "a.b", "*", ">"):
        with pytest.raises(ResponseNotFound):
            await store.get(tenant, identifier(1))
        with pytest.raises(PreviousNotFound):
            await store.conversation(tenant, identifier(1), max_bytes=100)


@pytest.mark.parametrize("name", ["", "resp_", "resp_*", "resp_0000000g", "resp_00000000.>", "x", f"resp_{'0' * 65}"])
async def test_what_is_no_id_is_not_found(name):
    with pytest.raises(ResponseNotFound):
        await (await stored(1)).get("a", name)


async def test_a_response_whose_conversation_was_dropped_in_part_cannot_be_gone_on_from():
    store = await stored(1, 2)
    await store._values.delete(f"a.{identifier(1)}")
    with pytest.raises(PreviousNotFound, match=identifier(1)):
        await store.conversation("a", identifier(2), max_bytes=100)


async def test_conversations_have_a_limit_of_bytes_and_of_responses():
    with pytest.raises(ConversationTooLong, match="20 bytes and the limit is 19"):
        await (await stored(1, 2)).conversation("a", identifier(2), max_bytes=19)
    store = await stored(*range(MAX_CHAIN + 1))
    with pytest.raises(ConversationTooLong, match="257 responses and the limit is 256"):
        await store.conversation("a", identifier(MAX_CHAIN), max_bytes=10_000)


@pytest.mark.parametrize("status", ["in_progress", "failed", "cancelled"])
async def test_only_what_has_ended_is_gone_on_from(status):
    with pytest.raises(InvalidRequest, match=f"is {status}"):
        await (await stored(1, status=status)).conversation("a", identifier(1), max_bytes=100)


async def test_an_item_is_found_by_its_id_alone():
    store = await stored(1, 2)
    name = f"msg_{1:024x}_0"
    found = items_by_id(await store.items_beside("a", name), [name])
    assert msgspec.json.decode(found[name])["content"] == "1"
    for tenant, other in (("b", name), ("a", f"msg_{9:024x}_0"), ("a", "msg_x"), ("a", "msg_*_0"), ("a", "")):
        with pytest.raises(ItemNotFound):
            await store.items_beside(tenant, other)


def test_of_the_items_that_are_wanted_each_is_found_once_whoever_else_has_an_id_or_none():
    lists = [b'[{"id":"a","n":1},{"id":null},{}]', b'[{"id":"a","n":2},{"id":"b"},{"id":"c"}]']
    assert items_by_id(lists, ["b", "a"]) == {"a": b'{"id":"a","n":1}', "b": b'{"id":"b"}'}
    with pytest.raises(ItemNotFound, match="'d'"):
        items_by_id(lists, ["a", "d"])


async def test_without_nats_it_says_what_needs_it_and_tells_clients_no_addresses():
    store = await stored(1)
    store._values.fails = EventPlaneUnavailable("no connection to NATS at nats://10.0.0.1:4222")
    with pytest.raises(NotKept, match=r"'background' needs the store.*10\.0\.0\.1") as refused:
        await store.check("'background'")
    assert "10.0.0.1" not in refused.value.for_client()
