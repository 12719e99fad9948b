import asyncio
import contextlib
import json

import msgspec
import numpy as np
import pytest

from app.responses.background import Background, Question, Wish
from app.responses.follow import follow
from app.responses.store import ResponseNotFound, ResponseStore, StoredResponse
from app.serving.errors import GatewayStopping
from app.serving.request import GatewayRequest
from planes.events import EventPlaneUnavailable, NobodyListens, Reply
from planes.wire.frames import Format, Sampling
from planes.wire.messages import RequestId
from planes.wire.response_object import event, response_event, response_object
from tests.fakes import FakeValues
from tests.openai_types import sse

RESPONSE = "resp_" + "0" * 24


class Messenger:
    """One NATS for all gateways."""

    def __init__(self):
        self.answers = {}
        self.fails = None

    def subject(self, kind, who):
        return f"{kind}.{who}"

    async def serve(self, subject, kind, answer):
        self.answers[subject] = lambda payload: answer(msgspec.msgpack.decode(payload, type=kind))

    async def request(self, subject, payload=b"", *, timeout_s):
        del timeout_s
        if self.fails is not None:
            raise self.fails
        if subject not in self.answers:
            raise NobodyListens(subject)
        return Reply(self.answers[subject](payload), {}, "")


class Relay:
    """Says what a test puts in; ends when it says so."""

    def __init__(self):
        self.steps: asyncio.Queue = asyncio.Queue()

    async def run(self, request, response):
        del request
        try:
            while (step := await self.steps.get()) is not None:
                step(response)
        except asyncio.CancelledError:
            if not response.is_gone:
                response.fail(GatewayStopping(), [])
            raise


class Scene:
    def __init__(self, *, max_value_bytes=1 << 20):
        self.values, self.messenger, self.relay = FakeValues(max_value_bytes), Messenger(), Relay()
        self.store = ResponseStore(self.values)
        self.one = Background(self.store, self.messenger, self.relay, gateway="one", retry_s=0.0)
        self.other = Background(self.store, self.messenger, self.relay, gateway="other")
        self.is_released = False

    async def __aenter__(self):
        self.tasks = [asyncio.create_task(gateway.run()) for gateway in (self.one, self.other)]
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_):
        for gateway in (self.one, self.other):
            await gateway.stop(0.0)
        await asyncio.gather(*self.tasks)

    async def start(self, *, is_streaming=True):
        layout = Format("response", RESPONSE, "m", 7, is_streaming=is_streaming)
        self.layout = layout
        job = GatewayRequest(
            request=RequestId("r"),
            model="m",
            prompt=np.arange(4, dtype=np.uint32),
            blocks=np.arange(0, dtype=np.uint64),
            block_size=16,
            sampling=Sampling(9),
            format=layout,
            arrived_at=0.0,
            deadline=60.0,
            tenant="a",
        )
        record = StoredResponse(
            response_object(layout, "in_progress"), gateway="one", is_background=True, is_streamed=is_streaming
        )
        held = contextlib.ExitStack()
        held.callback(setattr, self, "is_released", True)
        await self.one.start(job, record, b"[]", held)

    def say(self, step):
        self.relay.steps.put_nowait(step)

    def told(self, *numbers):
        for number in numbers:
            self.say(lambda response, number=number: response.write(delta(number)))

    def ends(self, number):
        last = response_event("response.completed", number, response_object(self.layout, "completed"))
        self.say(lambda response: response.end(delta(number - 1) + last))
        self.say(None)

    async def followed(self, gateway, after=-1):
        pieces = [piece async for piece in follow(self.store, gateway, "a", RESPONSE, after=after)]
        return sse(b"".join(pieces))


def delta(number):
    return event("response.output_text.delta", number, b'"delta":"' + b"x" * 70 + b'"')


async def test_a_response_runs_on_without_its_client_and_any_gateway_has_it():
    async with Scene() as scene:
        await scene.start(is_streaming=False)
        assert (await scene.other.find("a", RESPONSE)).status == "in_progress"
        async with scene.store.changes("a", RESPONSE) as changes:
            scene.say(lambda response: response.whole(200, [], response_object(scene.layout, "completed")))
            scene.say(None)
            await changes.next(5.0)
        found = await scene.other.find("a", RESPONSE)
        assert (found.status, found.gateway, scene.is_released) == ("completed", "", True)


async def test_a_stream_is_followed_from_any_event_on_wherever_it_runs():
    async with Scene() as scene:
        await scene.start()
        scene.told(0, 1, 2, 3)
        followers = [asyncio.create_task(scene.followed(scene.other, after)) for after in (-1, 2, 5, 6)]
        await asyncio.sleep(0)
        scene.told(4)
        scene.ends(6)
        told = [await follower for follower in followers]
        assert [each["sequence_number"] for each in told[0]] == [0, 1, 2, 3, 4, 5, 6]
        assert told[0][-1]["type"] == "response.completed"
        assert told[1:] == [told[0][3:], told[0][6:], []]
        assert await scene.followed(scene.one) == told[0]


async def test_what_fails_is_the_streams_last_event():
    async with Scene() as scene:
        await scene.start()
        scene.told(0)
        scene.say(lambda response: response.fail(GatewayStopping(), []))
        scene.say(None)
        told = await scene.followed(scene.other)
        assert [(each["type"], each["sequence_number"]) for each in told[1:]] == [("response.failed", 1)]


async def test_cancelled_anywhere_it_stops():
    async with Scene() as scene:
        await scene.start()
        scene.told(0)
        record = await scene.other.find("a", RESPONSE, Wish.CANCEL)
        assert record.status == "cancelled"
        assert scene.is_released
        told = await scene.followed(scene.other)
        assert (told[-1]["type"], told[-1]["response"]["status"]) == ("response.incomplete", "cancelled")
        assert await scene.one.find("a", RESPONSE, Wish.CANCEL) == record


async def test_discarded_it_leaves_nothing():
    async with Scene() as scene:
        await scene.start()
        await scene.other.find("a", RESPONSE, Wish.DISCARD)
        await scene.store.delete("a", RESPONSE)
    with pytest.raises(ResponseNotFound):
        await scene.store.get("a", RESPONSE)


@pytest.mark.parametrize(("wish", "status"), [(Wish.NOTHING, "failed"), (Wish.CANCEL, "cancelled")])
async def test_a_response_whose_gateway_is_gone_ends_when_it_is_asked_for(wish, status):
    async with Scene() as scene:
        await scene.start()
        del scene.messenger.answers["background.one"]
        assert (await scene.other.find("a", RESPONSE, wish)).status == status
        assert (await scene.store.get("a", RESPONSE)).status == status
        await scene.store.delete("a", RESPONSE)


async def test_silence_is_no_proof_that_a_gateway_is_gone():
    async with Scene() as scene:
        await scene.start()
        scene.messenger.fails = EventPlaneUnavailable("no answer")
        assert (await scene.other.find("a", RESPONSE)).status == "in_progress"


async def test_a_gateway_that_stops_says_so():
    async with Scene() as scene:
        await scene.start()
        await asyncio.sleep(0)
    record = await scene.store.get("a", RESPONSE)
    assert (record.status, "stopping" in json.loads(record.body)["error"]["message"]) == ("failed", True)


async def test_a_response_too_long_to_be_kept_has_failed():
    async with Scene(max_value_bytes=400) as scene:
        await scene.start(is_streaming=False)
        whole = response_object(scene.layout, "completed", output=b'["' + b"x" * 500 + b'"]')
        async with scene.store.changes("a", RESPONSE) as changes:
            scene.say(lambda response: response.whole(200, [], whole))
            scene.say(None)
            await changes.next(5.0)
        record = await scene.other.find("a", RESPONSE)
        assert (record.status, "cannot be kept" in json.loads(record.body)["error"]["message"]) == ("failed", True)


def test_questions_travel_whole():
    question = Question("a", RESPONSE, Wish.CANCEL)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(question), type=Question) == question
