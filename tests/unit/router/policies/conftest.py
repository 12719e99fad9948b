import random
from types import SimpleNamespace

import numpy as np
import pytest

from planes.wire.messages import EngineFacts, HandoverMode, LatencyPrior, RequestId, Role, WorkerId
from router.latency import LatencyModel, LinkModel
from router.policy import FleetView, WorkerView
from router.request import RoutableRequest

FACTS = EngineFacts(
    block_size=16,
    num_blocks=1000,
    context_length=100_000,
    max_batch=64,
    max_step_tokens=2048,
    bytes_per_block=1 << 20,
    vocab_size=256,
)


@pytest.fixture
def worker():
    def make(name, role="both", **load):
        fields = {
            "handover": HandoverMode.PULL,
            "cached_tokens": 0,
            "num_running": 0,
            "num_waiting": 0,
            "waiting_prefill_tokens": 0,
            "queue_s": 0.0,
            "kv_tokens": 0,
            "free_blocks": 1000,
            "utilisation": 0.0,
            "num_cached": 0,
        } | load
        return WorkerView(
            worker=WorkerId(name), role=Role(role), facts=FACTS, latency=LatencyModel(LatencyPrior()), **fields
        )

    return make


@pytest.fixture
def view():
    def make(*workers, seed=0):
        return FleetView(
            prefill=[worker for worker in workers if worker.role.can_prefill],
            decode=[worker for worker in workers if worker.role.can_decode],
            links=SimpleNamespace(link=lambda _prefill, _decode: LinkModel(LatencyPrior())),
            now=0.0,
            rng=random.Random(seed),
        )

    return make


@pytest.fixture
def request_of():
    def make(prompt_tokens, *, is_local_only=False):
        return RoutableRequest(
            request=RequestId("r"),
            model="m",
            blocks=np.arange(prompt_tokens // 16, dtype=np.uint64),
            prompt_tokens=prompt_tokens,
            expected_tokens=100,
            deadline=600.0,
            is_local_only=is_local_only,
        )

    return make
