import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.requests import Request

from app.anthropic.message import parse_message
from app.http.body import BodiesFull, BodyMemory
from app.http.intake import read_request
from app.keys.tenant import ANYBODY, Tenant
from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.prompt.prepare import Preprocessor
from app.telemetry.trace_context import TraceContext
from planes.wire.blocks import name_blocks, root
from planes.wire.errors import InvalidRequest
from planes.wire.frames import pack_tokens
from planes.wire.messages import RequestId
from router.request import SloSource
from tests.sim_model import sim_model

MESSAGES = [{"role": "user", "content": "what is a KV cache?"}]


@pytest.fixture(scope="module")
def model():
    return sim_model(context_length=4096, digest="ab" * 32)


@pytest.fixture
def gateway(model):
    preprocessor = Preprocessor()
    yield SimpleNamespace(
        settings=SimpleNamespace(request_timeout_s=60.0, max_body_bytes=1 << 24),
        tracer=None,
        bodies=BodyMemory(1 << 24),
        models=SimpleNamespace(longest_context=4096, entry=lambda name: model),
        preprocessor=preprocessor,
        clock=time.monotonic,
        wall_clock=lambda: 1_700_000_000.0,
    )
    preprocessor.close()


async def read(gateway, parse=parse_chat, tenant=ANYBODY, headers=None, **fields):
    body = json.dumps({"model": "sim", **fields}).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    request = Request({"type": "http", "headers": []}, receive)
    return await read_request(
        gateway, request, headers=headers or {}, tenant=tenant, request_id=RequestId("r"), parse=parse
    )


async def test_a_request_carries_the_card_that_its_tokens_are_of(gateway, model):
    request = await read(gateway, messages=MESSAGES)
    assert request.card_digest == model.digest == "ab" * 32
    assert request.routable(num_tokens=0, excluded=frozenset(), is_retry=False).card_digest == model.digest


async def test_tenants_name_the_blocks_of_one_prompt_differently(gateway):
    one, other = Tenant("a", cache_salt="tenant a"), Tenant("b", cache_salt="tenant b")
    requests = [await read(gateway, tenant=tenant, messages=MESSAGES * 20) for tenant in (one, other, one)]
    assert len(requests[0].blocks)
    assert np.array_equal(requests[0].blocks, requests[2].blocks)
    assert not np.intersect1d(requests[0].blocks, requests[1].blocks).size
    expected = name_blocks(requests[0].prompt, requests[0].block_size, root("sim", one.salted("")))
    assert np.array_equal(requests[0].blocks, expected)
    assert (requests[0].cache_salt, requests[1].cache_salt) == (one.salted(""), other.salted(""))


async def test_a_body_counts_until_its_prompt_is_tokens(gateway):
    memory = gateway.bodies
    memory.take(1 << 24)
    with pytest.raises(BodiesFull):
        await read(gateway, parse_completion, prompt=[1] * 100_000)
    memory.num_bytes = 0
    assert (await read(gateway, messages=MESSAGES)).prompt.size
    assert memory.num_bytes == 0


async def test_a_script_is_for_workers_that_simulate(gateway, model):
    headers = {"x-headrace-script": '["said"]'}
    with pytest.raises(InvalidRequest, match="simulated engine") as refused:
        await read(gateway, messages=MESSAGES, headers=headers)
    assert refused.value.param == "x-headrace-script"
    assert not (await read(gateway, messages=MESSAGES)).sampling.script
    gateway.models.entry = lambda name: replace(model, is_simulated=True)
    request = await read(gateway, messages=MESSAGES, headers=headers)
    assert request.sampling.script == pack_tokens(model.tokenizer.encode_text("said"))


async def test_a_budget_of_thoughts_is_for_workers_that_keep_to_it(gateway, model):
    asked = {"messages": MESSAGES, "thinking_token_budget": 9}
    gateway.models.entry = lambda name: replace(model, reasoning_parser="think")
    assert (await read(gateway, **asked)).sampling.thinking_tokens == 9
    gateway.models.entry = lambda name: replace(model, reasoning_parser="think", lacks=frozenset({"thinking_budget"}))
    with pytest.raises(InvalidRequest, match="leave the budget out") as refused:
        await read(gateway, **asked)
    assert refused.value.param == "thinking_token_budget"
    gateway.models.entry = lambda name: replace(model, lacks=frozenset({"thinking_budget"}))
    assert (await read(gateway, **asked)).sampling.thinking_tokens is None


async def test_a_request_knows_whether_its_workers_know_their_own_tokens(gateway, model):
    assert (await read(gateway, messages=MESSAGES)).has_own_tokens
    gateway.models.entry = lambda name: replace(model, lacks=frozenset({"own_tokens"}))
    assert not (await read(gateway, messages=MESSAGES)).has_own_tokens


async def test_a_message_that_may_fill_the_context_tells_its_worker(gateway):
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    bound = [
        (await read(gateway, parse_message, **asked, max_tokens=length)).format.is_context_bound
        for length in (32, 32_000)
    ]
    assert bound == [False, True]
    assert not (await read(gateway, **asked)).format.is_context_bound


async def test_what_an_answer_shall_keep_reaches_the_router_at_every_attempt(gateway):
    request = await read(gateway, messages=MESSAGES, slo_ttft_ms=250, slo_itl_ms=40)
    first, retried = (request.routable(num_tokens=0, excluded=frozenset(), is_retry=again) for again in (False, True))
    assert (first.slo_ttft_s, first.slo_itl_s, first.is_retry) == (0.25, 0.04, False)
    assert (retried.slo_ttft_s, retried.slo_itl_s, retried.is_retry) == (0.25, 0.04, True)


async def test_a_field_goes_before_its_header(gateway):
    headers = {"x-headrace-slo-ttft-ms": "1000", "x-headrace-slo-itl-ms": "20"}
    by_header = await read(gateway, messages=MESSAGES, headers=headers)
    assert (by_header.slo_ttft_s, by_header.slo_itl_s) == (1.0, 0.02)
    request = await read(gateway, messages=MESSAGES, headers=headers, slo_itl_ms=40)
    assert (request.slo_ttft_s, request.slo_itl_s) == (1.0, 0.04)


async def test_a_request_that_says_nothing_has_what_its_key_has(gateway):
    tenant = Tenant("a", slo_ttft_s=2.0, slo_itl_s=0.05)
    silent = await read(gateway, tenant=tenant, messages=MESSAGES)
    assert (silent.slo_ttft_s, silent.slo_itl_s) == (2.0, 0.05)
    assert (silent.slo_ttft_from, silent.slo_itl_from) == (SloSource.KEY, SloSource.KEY)
    headers = {"x-headrace-slo-itl-ms": "20"}
    request = await read(gateway, tenant=tenant, messages=MESSAGES, headers=headers, slo_ttft_ms=9000)
    assert (request.slo_ttft_s, request.slo_itl_s) == (9.0, 0.02)
    assert (request.slo_ttft_from, request.slo_itl_from) == (SloSource.REQUEST, SloSource.REQUEST)
    half = await read(gateway, tenant=tenant, messages=MESSAGES, slo_ttft_ms=9000)
    asked = half.routable(num_tokens=0, excluded=frozenset(), is_retry=False)
    assert (asked.slo_ttft_from, asked.slo_itl_from) == (SloSource.REQUEST, SloSource.KEY)


async def test_a_client_s_trace_goes_on_and_others_begin_one_where_requests_are_traced(gateway):
    theirs, ours = TraceContext("a" * 32, "b" * 16), TraceContext("c" * 32)
    asked = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    assert (await read(gateway, messages=MESSAGES)).trace is None
    assert (await read(gateway, messages=MESSAGES, headers=asked)).trace == theirs
    gateway.tracer = SimpleNamespace(started=lambda: ours)
    assert (await read(gateway, messages=MESSAGES, headers=asked)).trace == theirs
    for headers in ({}, {"traceparent": "nonsense"}):
        assert (await read(gateway, messages=MESSAGES, headers=headers)).trace == ours


async def test_prompts_of_one_completion_are_of_one_trace(gateway):
    started = iter([TraceContext("1" * 32), TraceContext("2" * 32)])
    gateway.tracer = SimpleNamespace(started=lambda: next(started))
    job = await read(gateway, parse_completion, prompt=["one", "two"])
    assert [each.trace for each in job.beside] == [job.trace]
