"""What the gateway says that it took itself, as `create_gateway` builds it and on the loop that it runs on."""

import asyncio

import numpy as np
import uvloop

from app.main import create_gateway
from app.serving.request import GatewayRequest
from app.settings import GatewaySettings
from planes.events import EventPlane
from planes.wire.frames import Format, Sampling
from planes.wire.messages import RequestId
from tests.fakes import FakeResponse, registration

NUM_REQUESTS = 50


def request(number, now):
    return GatewayRequest(
        request=RequestId(f"r{number}"),
        model="sim",
        prompt=np.arange(1, 21, dtype=np.uint32),
        blocks=np.empty(0, np.uint64),
        block_size=16,
        sampling=Sampling(max_tokens=1),
        format=Format("chat", "id", "sim", 0),
        arrived_at=now,
        deadline=now + 60.0,
    )


def test_a_request_bound_in_the_turn_of_the_loop_in_which_it_came_has_taken_time(tmp_path):
    """Each of many: now and then a request sees even a coarse clock advance."""

    async def serve():
        gateway = create_gateway(GatewaySettings(cache_dir=tmp_path), EventPlane("nats://127.0.0.1:1", "ns"))
        gateway.router.worker_up(registration("d0"))
        for number in range(NUM_REQUESTS):
            ended = asyncio.Event()
            serving = gateway.relay.begin(request(number, gateway.clock()), FakeResponse(), ended.set)
            await ended.wait()  # the worker is not there: all that matters happens before that is known
            assert serving.exchange.attempts, "it was bound"
        gateway.dispatcher.stop()
        gateway.preprocessor.close()
        return [found.timeline.overhead_s for found in gateway.router.recent(None, NUM_REQUESTS)]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        overheads = runner.run(serve())
    assert len(overheads) == NUM_REQUESTS
    assert min(overheads) > 0
