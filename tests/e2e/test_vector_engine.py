"""VllmEngine making vectors of prompts: of a model that generates, and of one whose layers keep no KV cache."""

import asyncio
import base64

import numpy as np
import pytest
import pytest_asyncio

from planes.wire.blocks import name_blocks, root
from tests.e2e.encoder_model import HIDDEN, MOST_TOKENS, VOCAB_SIZE, write_encoder_model

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

BLOCK, STEP_TOKENS, CONTEXT = 32, 32, 512


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engines(start_engine, tmp_path_factory):
    """The demo model, in steps of few tokens, and the encoder."""
    encoder = write_encoder_model(tmp_path_factory.mktemp("encoder") / "model")
    embeds = {"is_embedding": True, "handover": None}
    return await asyncio.gather(
        start_engine("v-1", **embeds, max_model_len=CONTEXT, max_num_batched_tokens=STEP_TOKENS),
        start_engine("v-2", **embeds, max_model_len=None, model_path=str(encoder)),
    )


def prompt(seed, num_tokens, vocab_size=40_000):
    return np.random.default_rng(seed).integers(10, vocab_size, num_tokens).tolist()


async def vector(engine, tokens, **options):
    """With the output that it came in."""
    answer = await engine.run(tokens, {"max_tokens": 1}, is_embedding=True, **options)
    assert answer.last["finish"] == "stop", answer.last
    assert len(answer.outputs) == 1
    return np.frombuffer(base64.b64decode(answer.last["embedding"]), dtype="<f4"), answer.last


async def test_a_vector_is_of_length_1_and_a_prompt_s_own_whatever_is_cached(engines):
    engine, _ = engines
    tokens = prompt(1, 100)
    first, cold = await vector(engine, tokens)
    again, warm = await vector(engine, tokens)
    salted, other = await vector(engine, tokens, salt="tenant")
    assert [output["cached_tokens"] for output in (cold, warm, other)] == [0, 100 // BLOCK * BLOCK, 0]
    assert cold["prefill_s"] > 0
    assert first.shape == (engine.ready["facts"]["embedding_size"],)
    assert np.linalg.norm(first) == pytest.approx(1.0, abs=1e-5)
    assert first @ again > 0.99999
    assert first @ salted > 0.99999
    assert first @ (await vector(engine, tokens[::-1]))[0] < 0.999
    names = set(name_blocks(np.array(tokens, dtype=np.uint32), BLOCK, root("demo", "")).tolist())
    await engine.until(lambda: names <= engine.held)


async def test_a_prompt_may_take_the_whole_context(engines):
    for engine, vocab_size in zip(engines, (40_000, VOCAB_SIZE), strict=True):
        assert np.isfinite((await vector(engine, prompt(2, CONTEXT, vocab_size)))[0]).all()


async def test_what_nobody_waits_for_any_more_is_not_computed(engines):
    engine, _ = engines

    def computed():
        """Tokens of prompts, of which one alone in its step counts as decoded."""
        return sum(news["sample"][0] + news["sample"][2] for news in engine.said if news["kind"] == "step")

    before = computed()
    name, given_up = engine.begin(prompt(3, CONTEXT), {"max_tokens": 1}, is_embedding=True)
    await engine.until(lambda: computed() > before)
    engine.send("abort", id=name)
    await vector(engine, prompt(4, CONTEXT))  # what has less left than this one would be computed before it
    assert not given_up.outputs
    assert computed() < before + 2 * CONTEXT
    engine.send("load")
    await engine.until(lambda: "load" in engine.kinds())
    load = next(news for news in engine.said if news["kind"] == "load")
    facts = engine.ready["facts"]
    assert (load["num_running"], load["num_waiting"], load["free_blocks"]) == (0, 0, facts["num_blocks"])


async def test_a_model_without_a_kv_cache_has_room_for_all_that_may_run(engines):
    _, engine = engines
    facts = engine.ready["facts"]
    assert facts["context_length"] == MOST_TOKENS  # nobody said so: it has positions for no more
    assert facts["bytes_per_block"] == 0
    assert facts["num_blocks"] == facts["max_batch"] * MOST_TOKENS // facts["block_size"]
    assert (facts["embedding_size"], facts["is_matryoshka"], facts["matryoshka_dimensions"]) == (HIDDEN, True, [16, 32])
    assert facts["max_step_tokens"] >= MOST_TOKENS  # a prompt is computed in one piece
    prompts = [prompt(seed, 20 + seed, VOCAB_SIZE) for seed in range(12)]
    together = await asyncio.gather(*(vector(engine, tokens) for tokens in prompts))
    for (beside, _), tokens in zip(together, prompts, strict=True):
        alone, _ = await vector(engine, tokens)
        assert beside @ alone > 0.99999
