import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest

from app.http.embedded import MOST_AT_ONCE, run_embedded
from app.openai.embeddings import parse_embedding
from planes.wire.errors import Rejected

ASKED = parse_embedding(b'{"model": "m", "input": "a"}')


class Response:
    is_gone = is_ended = False
    body = error = None

    def whole(self, status, headers, body):
        self.is_ended, self.body = True, json.loads(body)

    def fail(self, exc, headers):
        assert not self.is_ended
        self.is_ended, self.error = True, exc


class Relay:
    """Answers the later the earlier it was asked; refuses the numbers in `refused`."""

    def __init__(self, refused=()):
        self.refused = refused
        self.num_running = self.most_running = self.num_asked = 0

    async def run(self, job, response):
        self.num_asked += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        for _ in range(MOST_AT_ONCE - job.number % MOST_AT_ONCE):
            await asyncio.sleep(0)
        self.num_running -= 1
        if job.number in self.refused:
            response.fail(Rejected(f"{job.number}"), ())
        else:
            response.whole(200, (), np.array([job.number], dtype="<f4").tobytes())


def jobs(count):
    layout = SimpleNamespace(model="m")
    return [SimpleNamespace(number=number, prompt=[0, 0], format=layout) for number in range(count)]


@pytest.mark.parametrize("count", [1, 50])
async def test_vectors_are_in_the_order_of_their_texts_and_few_run_at_once(count):
    relay, response = Relay(), Response()
    await run_embedded(relay, jobs(count), ASKED, response)
    assert [each["embedding"] for each in response.body["data"]] == [[float(number)] for number in range(count)]
    assert response.body["usage"] == {"prompt_tokens": 2 * count, "total_tokens": 2 * count}
    assert relay.most_running == min(count, MOST_AT_ONCE)


async def test_a_text_that_fails_ends_it_once_and_nothing_more_is_begun():
    relay, response = Relay(refused=(3, 4)), Response()
    await run_embedded(relay, jobs(500), ASKED, response)
    assert str(response.error) in ("3", "4")
    assert response.body is None
    assert relay.num_asked < 100
