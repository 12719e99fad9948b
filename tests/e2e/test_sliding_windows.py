"""Handovers of a model whose KV cache comes in groups: layers with a sliding window hold the end of a prompt alone."""

import asyncio

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from planes.wire.blocks import name_blocks, root
from planes.wire.frames import DecodeLeg, PrefillLeg
from planes.wire.messages import HandoverMode
from tests.e2e.conftest import engine_pair
from tests.e2e.legs import hand_over, tagged
from tests.e2e.sliding_model import VOCAB_SIZE, WINDOW_TOKENS, write_sliding_model

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

BLOCK = 32
ELSEWHERE = "another tenant"  # a salt: nothing cached under it
LENGTHS = (1, 31, 32, 63, 64, 65, 150, 256, 641)


def prompt(seed, num_tokens):
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, num_tokens).tolist()


def blocks_of(tokens):
    return set(name_blocks(np.array(tokens, dtype=np.uint32), BLOCK, root("demo", "")).tolist())


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=list(HandoverMode), ids=str)
async def pair(request, compiled, tmp_path_factory):
    model = write_sliding_model(tmp_path_factory.mktemp("sliding") / "model")
    async with engine_pair(request.param, model, compiled, kv_cache_bytes=16 << 20) as both:
        yield both


async def test_a_token_depends_on_tokens_far_outside_the_window(pair):
    _, prefill, _ = pair
    tokens = prompt(0, 5 * WINDOW_TOKENS)
    other = [*tokens[:20], *prompt(1, 20), *tokens[40:]]
    first, second = await asyncio.gather(*(prefill.run(each, {"max_tokens": 16}) for each in (tokens, other)))
    assert first.tokens != second.tokens


@pytest.mark.parametrize("forward_first", [False, True])
async def test_a_handed_over_answer_equals_one_engine_s_token_for_token(pair, forward_first):
    mode, prefill, _ = pair
    if forward_first and mode is HandoverMode.PUSH:
        return  # both legs have begun when the first token comes
    sampling = {"max_tokens": 2 * WINDOW_TOKENS, "ignore_eos": True}  # the window leaves the prompt behind
    for num_tokens in LENGTHS:
        tokens = prompt(num_tokens, num_tokens)
        alone = await prefill.run(tokens, sampling, salt=ELSEWHERE)
        name = f"equal-{num_tokens}-{forward_first}"
        first, rest = await hand_over(pair, tokens, sampling, forward_first=forward_first, name=name)
        assert (first.tokens if forward_first else []) + rest.tokens == alone.tokens, num_tokens
        assert len(set(alone.tokens)) > 8, "an answer that says one thing over and over proves nothing"


async def test_what_both_hold_is_not_fetched_again_and_has_the_gateway_s_names(pair):
    _, prefill, decode = pair
    shared, sampling = prompt(700, 320), {"max_tokens": 16, "ignore_eos": True}
    _, cold = await hand_over(pair, shared, sampling, name="cold")
    await prefill.until(lambda: blocks_of(shared) <= prefill.held)
    await decode.until(lambda: blocks_of(shared) <= decode.held)
    longer = shared + prompt(701, 100)
    alone = await prefill.run(longer, sampling, salt=ELSEWHERE)
    first, rest = await hand_over(pair, longer, sampling, name="longer")
    assert rest.tokens == alone.tokens
    assert first.last["cached_tokens"] == 320
    assert 0 < rest.last["handover_bytes"] < cold.last["handover_bytes"]


async def test_handover_parameters_name_the_blocks_of_every_group(pair):
    mode, prefill, decode = pair
    if mode is HandoverMode.PUSH:
        return  # a push leg has no ticket
    tokens = prompt(800, 200)
    good = (await prefill.run(tokens, None, tagged(PrefillLeg(mode)))).ticket
    params = msgspec.msgpack.decode(good.params)
    groups = params["remote_block_ids"]
    assert len(groups) > 1
    for wrong in ([[]] * len(groups), groups[:1], [*groups, groups[0]]):
        bad = msgspec.structs.replace(good, params=msgspec.msgpack.encode(params | {"remote_block_ids": wrong}))
        answer = await decode.run(tokens, None, tagged(DecodeLeg(ticket=bad)))
        assert answer.invalid["code"] == "malformed_handover"
    assert (await decode.run(tokens, None, tagged(DecodeLeg(ticket=good)))).last["finish"] == "length"
