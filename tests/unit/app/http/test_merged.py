import asyncio
import gc
import json
import weakref

import numpy as np
import pytest

from app.http.merged import run_merged
from app.serving.request import GatewayRequest
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Format, Sampling
from planes.wire.messages import RequestId
from tests.fakes import FakeResponse

HEAD = [("x-request-id", "r-1"), ("x-headrace-decode", "d0")]


def job(number, n=2):
    return GatewayRequest(
        request=RequestId("r" if not number else f"r-{number}"),
        model="m",
        prompt=np.arange(3, dtype=np.uint32),
        blocks=np.empty(0, np.uint64),
        block_size=16,
        sampling=Sampling(5, n=n),
        format=Format("completion", "cmpl-r", "m", 0),
        arrived_at=0.0,
        deadline=9.0,
    )


class Script:
    """A relay that lets each part be played by the test's function for it."""

    def __init__(self, *plays):
        self.plays = dict(zip(("r", "r-1", "r-2"), plays, strict=False))
        self.cancelled = []

    async def run(self, request, response):
        try:
            await self.plays[request.request](response)
        except asyncio.CancelledError:
            self.cancelled.append((request.request, response.is_gone))
            raise


async def run(*plays):
    relay, response = Script(*plays), FakeResponse()
    await asyncio.wait_for(run_merged(relay, [job(number) for number in range(len(plays))], response), 60)
    assert response.is_ended
    return relay, response


def event(index, text):
    return b'data: {"id":"x","choices":[{"index":%d,"text":%b}]}\n\n' % (index, json.dumps(text).encode())


def usage(prompt, completion, cached):
    told = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return b"data: " + json.dumps({"id": "x", "choices": [], "usage": told}, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def events(response):
    return [json.loads(line) for line in b"".join(response.payloads).decode().replace("data: ", "").split("\n\n")[:-2]]


async def test_streams_are_renumbered_and_end_once_with_the_sum_of_their_usage():
    first_is_over = asyncio.Event()

    async def first(part):
        part.begin(HEAD)
        part.write(event(0, "a") + event(1, 'b "choices":[{"index":0'))
        part.end(event(0, "") + usage(3, 2, 1) + DONE)
        first_is_over.set()

    async def second(part):
        await first_is_over.wait()
        part.begin(HEAD)
        part.write(event(1, 'c "choices":[{"index":0'))
        part.end(usage(4, 1, 0) + DONE)

    _, response = await run(first, second)
    *said, last = events(response)
    assert [(e["choices"][0]["index"], e["choices"][0]["text"]) for e in said] == [
        (0, "a"),
        (1, 'b "choices":[{"index":0'),
        (0, ""),
        (3, 'c "choices":[{"index":0'),
    ]
    assert last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert b"".join(response.payloads).count(DONE) == 1
    assert response.headers["x-request-id"] == "r"


async def test_a_stream_without_usage_has_none():
    async def play(part):
        part.begin(HEAD)
        part.end(event(0, "a") + DONE)

    _, response = await run(play, play)
    assert [e["choices"][0]["index"] for e in events(response)] == [0, 2]


async def test_whole_answers_are_one_body_in_the_order_of_prompts():
    second_is_over = asyncio.Event()

    def body(text):
        choices = [{"index": index, "text": text} for index in (0, 1)]
        return json.dumps({"id": "x", "choices": choices, "usage": {"prompt_tokens": 2}}).encode()

    async def first(part):
        await second_is_over.wait()
        part.whole(200, HEAD, body("a"))

    async def second(part):
        part.whole(200, HEAD, body("b"))
        second_is_over.set()

    _, response = await run(first, second)
    told = json.loads(response.body)
    assert [(c["index"], c["text"]) for c in told["choices"]] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert told["usage"] == {"prompt_tokens": 4}
    assert response.headers["x-request-id"] == "r"


@pytest.mark.parametrize("has_begun", [True, False])
async def test_one_that_fails_ends_them_all_with_one_error(has_begun):
    async def waits(part):
        if has_begun:
            part.begin(HEAD)
            part.write(event(0, "a"))
        await asyncio.Event().wait()

    async def fails(part):
        await asyncio.sleep(0)
        part.fail(InvalidRequest("no", param="prompt"), HEAD)

    relay, response = await run(waits, fails, waits)
    assert relay.cancelled == [("r", True), ("r-2", True)]
    if has_begun:
        assert b'"param":"prompt"' in response.payloads[-1]
    else:
        assert (response.status, json.loads(response.body)["error"]["param"]) == (400, "prompt")


async def test_no_part_of_the_answer_waits_for_the_garbage_collector():
    parts = []

    async def play(response):
        parts.append(weakref.ref(response))
        response.begin(HEAD)
        response.end(b"data: [DONE]\n\n")

    gc.disable()
    try:
        await run(play, play)
        assert [part() for part in parts] == [None, None]
    finally:
        gc.enable()
