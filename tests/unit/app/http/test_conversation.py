import contextlib
import json
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app.http.body import BodiesFull, BodyMemory
from app.http.conversation import load_conversation, prepared_response
from app.http.routes.generate import Admitted
from app.keys.tenant import ANYBODY
from app.openai.responses.request import parse_response
from app.prompt.prepare import ContextExceeded, Preprocessor
from app.responses.store import ResponseStore, StoredResponse
from planes.wire.errors import InvalidRequest
from planes.wire.messages import RequestId
from tests.fakes import FakeValues
from tests.sim_model import sim_model

ITEM_CHARS = 100_000
MAX_BODY_BYTES = 10 * ITEM_CHARS


def item_id(response, place):
    return f"msg_{response:024x}_{place}"


class CountedValues(FakeValues):
    def __init__(self):
        super().__init__()
        self.num_reads = 0

    async def get(self, key):
        self.num_reads += 1
        return await super().get(key)


class CountingPreprocessor(Preprocessor):
    """Knows how many bytes its work was said to look at."""

    def __init__(self):
        super().__init__()
        self.counted = []

    async def run(self, work, *args, num_bytes, deadline=None):
        self.counted.append(num_bytes)
        return await super().run(work, *args, num_bytes=num_bytes, deadline=deadline)


@pytest.fixture(scope="module")
def model():
    return sim_model(context_length=512, digest="ab" * 32)


@pytest.fixture
async def gateway(model) -> Any:
    """With two responses, of three items of 100,000 characters each."""
    values = CountedValues()
    store = ResponseStore(values)
    for number in (1, 2):
        name = f"resp_{number:024x}"
        items = [
            {"type": "message", "role": "user", "id": item_id(number, place), "content": str(place) * ITEM_CHARS}
            for place in range(3)
        ]
        body = msgspec.json.encode({"id": name, "status": "completed", "output": items[1:]})
        await store.save(ANYBODY.name, name, StoredResponse(body), msgspec.json.encode(items[:1]))
    preprocessor = CountingPreprocessor()
    yield SimpleNamespace(
        settings=SimpleNamespace(request_timeout_s=60.0, max_body_bytes=MAX_BODY_BYTES),
        tracer=None,
        bodies=BodyMemory(MAX_BODY_BYTES),
        models=SimpleNamespace(longest_context=0, entry=lambda name: model),
        responses=store,
        preprocessor=preprocessor,
        clock=time.monotonic,
        wall_clock=lambda: 1_700_000_000.0,
        values=values,
    )
    preprocessor.close()


async def loaded(gateway, *ids, own=()):
    """The conversation of a request that refers to these items, the bytes of its body, and those that count.

    own: items that it sends.
    """
    references = [{"type": "item_reference", "id": one} for one in ids]
    body = json.dumps({"model": "sim", "input": [*references, *own]}).encode()
    with gateway.bodies.lease() as lease:
        conversation = await load_conversation(
            gateway, parse_response(body), ANYBODY, lease, len(body), is_stored=False
        )
        return conversation, len(body), gateway.bodies.num_bytes


async def test_items_that_are_referred_to_stand_where_they_are_meant(gateway):
    conversation, _, _ = await loaded(gateway, item_id(1, 2), item_id(2, 0), item_id(1, 2))
    said = [message["content"] for message in conversation.parsed.messages]
    assert said == [place * ITEM_CHARS for place in "202"]
    assert [item["id"] for item in json.loads(conversation.items)] == [item_id(1, 2), item_id(2, 0), item_id(1, 2)]


async def test_a_response_is_read_once_for_all_its_items(gateway):
    await loaded(gateway, item_id(1, 0), item_id(2, 0), item_id(1, 1), item_id(1, 0), item_id(1, 2))
    assert gateway.values.num_reads == 4  # of two responses, what each answered and its answer


async def test_an_item_counts_as_often_as_it_is_referred_to(gateway):
    conversation, num_bytes, taken = await loaded(gateway, *[item_id(1, 0)] * 5)
    assert conversation.parsed.num_bytes > num_bytes + 5 * ITEM_CHARS
    assert taken > 4 * ITEM_CHARS  # of each request some is not counted
    assert gateway.preprocessor.counted[0] > 3 * ITEM_CHARS  # the response, in which the item is looked for
    assert gateway.preprocessor.counted[1] > 5 * ITEM_CHARS  # the conversation


async def test_an_item_that_is_sent_beside_a_reference_to_it_counts_as_what_it_is_taken_for(gateway):
    with pytest.raises(InvalidRequest, match="257 item references were given"):
        await loaded(gateway, item_id(1, 0), own=[{"role": "user", "id": item_id(1, 0), "content": "x"}] * 256)


async def test_references_to_more_bytes_than_a_body_may_have_are_refused(gateway):
    with pytest.raises(InvalidRequest, match=r"10\d{5} bytes of items .* the limit is 9\d{5}") as refused:
        await loaded(gateway, *[item_id(1, 0)] * 10)
    assert refused.value.param == "input"


async def test_a_few_hundred_references_are_possible_and_more_are_refused_before_any_is_read(gateway):
    with pytest.raises(InvalidRequest, match="257 item references were given and the limit is 256") as refused:
        await loaded(gateway, *[item_id(1, 0)] * 257)
    assert refused.value.param == "input"
    assert gateway.values.num_reads == 0


async def test_items_for_which_no_memory_is_left_are_refused(gateway):
    gateway.bodies.take(MAX_BODY_BYTES - 4 * ITEM_CHARS)
    with pytest.raises(BodiesFull):
        await loaded(gateway, *[item_id(1, 0)] * 5)


@pytest.mark.parametrize("name", [item_id(1, 3), item_id(3, 0), "msg_x", "msg_*_0"])
async def test_an_item_that_is_not_kept_is_named(gateway, name):
    with pytest.raises(InvalidRequest) as refused:
        await loaded(gateway, item_id(1, 0), name)
    assert f"'{name}' not found" in str(refused.value)
    assert (refused.value.param, refused.value.code) == ("input", "item_not_found")


async def prepared(gateway, messages, **more):
    """What is made of a response's request with these messages."""
    asked = parse_response(json.dumps({"model": "sim", "input": messages, **more}).encode())
    parsed = asked.completed([], {}, is_stored=False, num_bytes=0)
    slots: Any = None
    request: Any = None
    admitted = Admitted(request, {}, ANYBODY, RequestId("r"), slots, contextlib.ExitStack())
    return await prepared_response(gateway, asked, parsed, admitted, gateway.clock())


def turns(count):
    return [{"role": "system", "content": "Be brief."}, *[{"role": "user", "content": f"{n:04}"} for n in range(count)]]


async def test_as_many_of_the_first_turns_are_left_out_as_have_no_room(gateway, model):
    with pytest.raises(ContextExceeded):
        await prepared(gateway, turns(200))
    job = await prepared(gateway, turns(200), truncation="auto")
    text = model.tokenizer.decode(job.prompt)
    kept = [n for n in range(200) if f"{n:04}" in text]
    assert "Be brief." in text
    assert kept == list(range(kept[0], 200))
    with pytest.raises(ContextExceeded):
        await prepared(gateway, [*turns(0), *turns(200)[kept[0] :]])


async def test_what_has_no_room_by_itself_is_refused_truncated_or_not(gateway):
    with pytest.raises(ContextExceeded):
        await prepared(gateway, [{"role": "user", "content": "word " * 1000}] * 2, truncation="auto")


async def test_a_long_conversation_is_not_copied_from_each_of_its_turns_on(gateway):
    messages = turns(2000)
    tracemalloc.start()
    try:
        await prepared(gateway, messages, truncation="auto")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # 2000 tuples of 1000 messages are 16 MB
    finally:
        tracemalloc.stop()
