"""VllmEngine on real weights: two engine processes and NIXL; float32 and greedy, so that tokens can be compared.

The engines are those of `test_one_engine.py`, which comes first: the last test here kills them.
"""

import asyncio
import os
import signal
import time

import msgspec
import numpy as np
import pytest

from planes.wire.blocks import name_blocks, root
from planes.wire.frames import DecodeLeg, PrefillLeg, StructuredOutput
from planes.wire.messages import HandoverMode
from tests.e2e.conftest import PATIENCE_S
from tests.e2e.legs import hand_over, tagged

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

BLOCK = 32
ELSEWHERE = "another tenant"  # a salt: nothing cached under it


def prompt(seed, num_tokens):
    return [1, *np.random.default_rng(seed).integers(1000, 49_000, num_tokens - 1).tolist()]


def blocks_of(tokens, salt=""):
    return set(name_blocks(np.array(tokens, dtype=np.uint32), BLOCK, root("demo", salt)).tolist())


async def test_a_handed_over_answer_equals_one_engine_s_token_for_token(pair):
    mode, prefill, _ = pair
    for seed, num_tokens in ((1, 150), (2, 641), (3, 256)):
        tokens = prompt(seed, num_tokens)
        alone = await prefill.run(tokens, {"max_tokens": 16}, salt=ELSEWHERE)
        first, rest = await hand_over(pair, tokens, {"max_tokens": 16}, name=f"equal-{seed}")
        assert rest.tokens == alone.tokens
        assert rest.last["finish"] == "length"
        assert first.tokens == alone.tokens[:1]
        assert first.ticket.mode is mode
        assert rest.last["handover_bytes"] > 0
        assert rest.last["handover_s"] > 0


@pytest.mark.parametrize("num_tokens", [333, 320])
async def test_the_first_token_may_be_forwarded_and_resumed_where_a_block_ends_too(pair, num_tokens):
    mode, prefill, _ = pair
    if mode is HandoverMode.PUSH:
        return  # both legs have begun when it comes
    tokens = prompt(4, num_tokens)
    alone = await prefill.run(tokens, {"max_tokens": 12}, salt=ELSEWHERE)
    first, rest = await hand_over(pair, tokens, {"max_tokens": 12}, forward_first=True, name=f"forward-{num_tokens}")
    assert first.tokens + rest.tokens == alone.tokens


async def test_a_repeated_prompt_is_cached_and_its_blocks_have_the_gateway_s_names(pair):
    _, prefill, decode = pair
    tokens = prompt(6, 300)
    first, rest = await hand_over(pair, tokens, name="cold")
    again, _ = await hand_over(pair, tokens, name="warm")
    assert first.last["cached_tokens"] == 0
    assert again.last["cached_tokens"] == 300 // BLOCK * BLOCK
    assert rest.outputs[0]["handover_bytes"] == rest.last["handover_bytes"] > 0
    alone = await prefill.run(tokens)
    assert alone.outputs[0]["cached_tokens"] == alone.last["cached_tokens"] == 300 // BLOCK * BLOCK
    assert alone.outputs[0]["prefill_s"] == alone.last["prefill_s"] > 0
    await prefill.until(lambda: blocks_of(tokens) <= prefill.held)
    await decode.until(lambda: blocks_of(tokens + rest.tokens[:-1]) <= decode.held)
    salted = await prefill.run(tokens, None, salt="tenant")
    assert salted.last["cached_tokens"] == 0
    await prefill.until(lambda: blocks_of(tokens, "tenant") <= prefill.held)


async def begin_decoding(pair, tokens, sampling, name):
    """Start the decode leg of a request whose prefill leg has ended."""
    mode, prefill, decode = pair
    first = await prefill.run(tokens, sampling, tagged(PrefillLeg(mode)), name=name)
    leg = DecodeLeg(ticket=first.ticket) if mode is HandoverMode.PULL else DecodeLeg(source=prefill.endpoint)
    return decode.begin(tokens, sampling, tagged(leg), name=name)[1]


def arrival(said, name):
    """What the engine reported with the KV cache of `name`, and the decoding sequences of the next step."""
    reports = iter([news for news in said if news["kind"] in ("arrived", "step")])
    arrived = next(news for news in reports if news["kind"] == "arrived" and news["id"] == name)
    return arrived["is_between_steps"], next(news["sample"][2] for news in reports if news["kind"] == "step")


async def test_a_handed_over_request_waits_for_no_step_that_could_have_computed_it(pair):
    mode, _, decode = pair
    await hand_over(pair, prompt(60, 40), name="handshake")
    alone = await decode.run(prompt(61, 40), {"max_tokens": 40, "ignore_eos": True}, salt=ELSEWHERE)
    running, beside = decode.begin(prompt(61, 40), {"max_tokens": 900, "ignore_eos": True})
    await decode.until(lambda: beside.outputs)
    came_between_steps = []
    # A step waits only so long: where the machine has other things to do, some KV caches come during the next.
    while len(came_between_steps) < 3 or (mode is HandoverMode.PULL and not any(came_between_steps)):
        name, num_said = f"step-{len(came_between_steps)}", len(decode.said)
        answer = await begin_decoding(pair, prompt(62 + len(came_between_steps), 70), {"max_tokens": 2}, name)
        await decode.until(lambda answer=answer: answer.last)
        is_between_steps, num_decoding = arrival(decode.said[num_said:], name)
        came_between_steps.append(is_between_steps)
        assert not beside.last, came_between_steps
        assert num_decoding == 2, "the next step computes it"
    await decode.until(lambda: len(beside.tokens) >= len(alone.tokens))
    decode.send("abort", id=running)
    assert beside.tokens[: len(alone.tokens)] == alone.tokens


async def test_a_long_prompt_leaves_room_for_the_tokens_of_handed_over_requests(pair):
    mode, prefill, decode = pair
    tokens, sampling = prompt(71, 70), {"max_tokens": 3}
    first = await prefill.run(tokens, sampling, tagged(PrefillLeg(mode)), name="beside a prompt")
    leg = DecodeLeg(ticket=first.ticket) if mode is HandoverMode.PULL else DecodeLeg(source=prefill.endpoint)
    num_said = len(decode.said)
    long, computing = decode.begin(prompt(70, 1000), {"max_tokens": 8})
    await decode.until(lambda: [news for news in decode.said[num_said:] if news["kind"] == "step"])
    answer = await decode.run(tokens, sampling, tagged(leg), name="beside a prompt")
    assert answer.last["finish"] == "length"
    assert not computing.outputs
    decode.send("abort", id=long)


async def test_a_short_prompt_passes_a_long_one_that_is_computed_in_chunks(pair):
    _, _, decode = pair
    num_said = len(decode.said)
    long, computing = decode.begin(prompt(72, 1000), {"max_tokens": 8})
    await decode.until(lambda: [news for news in decode.said[num_said:] if news["kind"] == "step"])
    num_said = len(decode.said)
    answer = await decode.run(prompt(73, 70), {"max_tokens": 1})
    assert answer.last["finish"] == "length"
    assert not computing.outputs
    decode.send("abort", id=long)
    facts = decode.ready["facts"]
    assert facts["is_shortest_first"]
    steps = [tuple(news["sample"][:2]) for news in decode.said[num_said:] if news["kind"] == "step"]
    all_its = facts["max_step_tokens"]  # a step that computes nothing but its beginning
    assert (all_its, all_its * (all_its + 1) // 2) in steps


async def test_malformed_handover_parameters_are_refused_and_the_engine_lives(pair):
    mode, _, decode = pair
    if mode is HandoverMode.PUSH:
        return  # a push leg has no ticket; its source is checked in the unit tests
    tokens = prompt(7, 100)
    good = (await pair[1].run(tokens, None, tagged(PrefillLeg(mode)))).ticket
    params = msgspec.msgpack.decode(good.params)
    for change in ({"remote_block_ids": []}, {"remote_block_ids": [[]] * 6}, {"remote_port": "x"}, {"tp_size": 0}):
        bad = msgspec.structs.replace(good, params=msgspec.msgpack.encode(params | change))
        answer = await decode.run(tokens, None, tagged(DecodeLeg(ticket=bad)))
        assert answer.invalid["code"] == "malformed_handover"
    late = msgspec.structs.replace(good, params=msgspec.msgpack.encode(params | {"written_at": 1.0}))
    expired = await decode.run(tokens, None, tagged(DecodeLeg(ticket=late)))
    assert expired.last["finish"] == "error"
    assert "old" in expired.last["error"]
    # The trial of a grammar, which comes first, takes longer than this ticket has left.
    left = {"written_at": time.time() - good.lease_s + 0.01}
    soon_late = msgspec.structs.replace(good, params=msgspec.msgpack.encode(params | left))
    untried = {"structured": StructuredOutput(json_schema='{"enum": ["a ticket\'s last moment"]}')}
    expired = await decode.run(tokens, untried, tagged(DecodeLeg(ticket=soon_late)))
    assert expired.last["finish"] == "error"
    assert "old" in expired.last["error"]
    assert (await decode.run(tokens, None, tagged(DecodeLeg(ticket=good)))).last["finish"] == "length"


async def free_blocks(engine):
    engine.said = [news for news in engine.said if news["kind"] != "load"]
    engine.send("load")
    await engine.until(lambda: "load" in engine.kinds())
    return next(news for news in engine.said if news["kind"] == "load")["free_blocks"]


async def until_free(engine, num_blocks):
    async with asyncio.timeout(PATIENCE_S):
        while await free_blocks(engine) < num_blocks:  # noqa: ASYNC110 - it tells its load when it is asked
            await asyncio.sleep(0.01)


async def give_up(engine, name, *, until):
    """Say that nobody will fetch a KV cache, and wait until so many blocks are free."""
    engine.send("abort", id=name)
    await until_free(engine, until)


async def test_a_prefill_worker_that_is_gone_fails_the_request_and_not_the_engine(pair):
    mode, prefill, decode = pair
    if mode is HandoverMode.PUSH:
        return  # nothing has been promised: see the next test
    tokens = prompt(8, 100)
    before = await free_blocks(prefill)
    good = (await prefill.run(tokens, None, tagged(PrefillLeg(mode)), name="unfetched")).ticket
    params = msgspec.msgpack.decode(good.params) | {"remote_port": 9, "remote_engine_id": "nobody"}
    nowhere = msgspec.structs.replace(good, params=msgspec.msgpack.encode(params))
    failed = await decode.run(tokens, None, tagged(DecodeLeg(ticket=nowhere)))
    assert failed.last["finish"] == "error"
    assert (await decode.run(tokens)).last["finish"] == "length"
    await give_up(prefill, "unfetched", until=before)


async def test_a_kv_cache_that_nobody_will_fetch_is_given_up_before_its_lease_is_over(pair):
    mode, prefill, _ = pair
    if mode is HandoverMode.PUSH:
        return  # whoever is pushed to may be written to already: the lease runs out
    before = await free_blocks(prefill)
    # The control's lease began earlier: were it a matter of time, its blocks would be free first.
    control = await prefill.run(prompt(80, 200), None, tagged(PrefillLeg(mode)), name="control")
    with_control = await free_blocks(prefill)
    abandoned = await prefill.run(prompt(81, 900), None, tagged(PrefillLeg(mode)), name="abandoned")
    with_both = await free_blocks(prefill)
    assert control.ticket is not None is not abandoned.ticket
    assert with_both < with_control - 2 < before - 4
    prefill.send("abort", id="abandoned")
    async with asyncio.timeout(PATIENCE_S):
        while (left := await free_blocks(prefill)) == with_both:  # noqa: ASYNC110 - it tells its load when it is asked
            await asyncio.sleep(0.01)
    assert left == with_control
    await give_up(prefill, "control", until=before)


async def test_a_kv_cache_that_nobody_writes_costs_the_request_and_no_blocks(pair):
    mode, prefill, decode = pair
    if mode is HandoverMode.PULL:
        return
    tokens = prompt(50, 300)
    before = decode.ready["facts"]["num_blocks"]
    await until_free(decode, before)  # what the tests above have given up ends
    failed = await decode.run(tokens, None, tagged(DecodeLeg(source=prefill.endpoint)), name="unwritten")
    assert failed.last["finish"] == "error"
    assert await free_blocks(decode) < before
    await until_free(decode, before)
    others = [prompt(51 + i, 900) for i in range(3)]  # they take all blocks
    answers = [(await decode.run(other)).tokens for other in others]
    late = await prefill.run(tokens, None, tagged(PrefillLeg(mode)), name="unwritten")
    assert late.last["finish"] == "length"
    await prefill.run(tokens)  # whatever was to be written has been
    again = [await decode.run(other) for other in reversed(others)]
    assert again[0].last["cached_tokens"] > 0
    assert [answer.tokens for answer in again] == answers[::-1]


async def test_a_first_token_that_ends_the_answer_leaves_no_ticket(pair):
    mode, prefill, _ = pair
    tokens = prompt(9, 90)
    first = (await prefill.run(tokens, {"max_tokens": 1}, tagged(PrefillLeg(mode)))).tokens[0]
    if mode is HandoverMode.PULL:
        stopped = await prefill.run(tokens, {"stop_token_ids": [first]}, tagged(PrefillLeg(mode)))
        assert stopped.last["finish"] == "stop"
        assert stopped.ticket is None
    only = await prefill.run(tokens, {"max_tokens": 1}, tagged(PrefillLeg(mode)))
    assert only.last["finish"] == "length"
    assert (only.ticket is None) == (mode is HandoverMode.PULL)  # whoever is pushed to has begun


async def test_sampling_parameters_reach_the_model_and_nothing_is_compiled_for_them(pair, compiled):
    mode, prefill, _ = pair
    if mode is HandoverMode.PUSH:
        return  # the same code
    tokens = prompt(10, 40)
    greedy = await prefill.run(tokens, {"logprobs": 3, "n": 2})
    assert greedy.by_choice[0] == greedy.by_choice[1]
    first = greedy.outputs[0]["logprobs"][0]
    assert len(first["top"]) == 3
    assert first["top"][0][0] == first["token"]
    assert first["top"][0][1] == first["logprob"] <= 0
    warm = {"temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 6}
    sampled, repeated = await prefill.run(tokens, warm), await prefill.run(tokens, warm)
    assert sampled.by_choice == repeated.by_choice
    assert len({tuple(choice) for choice in sampled.by_choice.values()}) > 1
    biased = await prefill.run(tokens, {"logit_bias": {4242: 100.0}, "max_tokens": 2})
    assert biased.tokens == [4242, 4242]
    ended = await prefill.run(tokens, {"logit_bias": {2: 100.0}})
    assert (ended.tokens, ended.last["finish"]) == ([2], "stop")
    ignoring = await prefill.run(tokens, {"logit_bias": {2: 100.0}, "ignore_eos": True, "max_tokens": 3})
    assert ignoring.tokens == [2, 2, 2]
    assert list(compiled.iterdir()) == []


async def test_requests_together_and_aborted_ones_leave_nothing_behind(pair):
    _, prefill, _ = pair
    started = [prefill.begin(prompt(20 + i, 60 + i), {"max_tokens": 40}) for i in range(4)]
    aborted, silent = prefill.begin(prompt(30, 64), {"max_tokens": 900})
    await prefill.until(lambda: silent.outputs)
    prefill.send("abort", id=aborted)
    await prefill.until(lambda: all(answer.last for _, answer in started))
    before = len(silent.outputs)
    prefill.said = [news for news in prefill.said if news["kind"] == "step"]
    prefill.send("load")
    await prefill.until(lambda: "load" in prefill.kinds())
    load = next(news for news in prefill.said if news["kind"] == "load")
    assert (load["num_running"], load["num_waiting"], load["waiting_prefill_tokens"]) == (0, 0, 0)
    assert len(silent.outputs) == before
    assert not silent.last
    samples = [news["sample"] for news in prefill.said if news["kind"] == "step"]
    prefill_tokens, pairs, batch, kv_tokens, duration_s = max(samples, key=lambda sample: sample[2])
    assert batch >= 4
    assert kv_tokens >= 4 * 60
    assert duration_s > 0
    assert prefill_tokens >= 0 <= pairs


async def test_the_engine_process_ends_with_its_worker_and_the_worker_hears_of_its_engine_s_end(pair):
    _, prefill, decode = pair
    orphan, has_ended = os.pidfd_open(prefill.ready["pids"][0]), asyncio.Event()
    asyncio.get_running_loop().add_reader(orphan, has_ended.set)
    prefill.process.kill()
    async with asyncio.timeout(PATIENCE_S):
        await has_ended.wait()
    asyncio.get_running_loop().remove_reader(orphan)
    os.close(orphan)
    (engine,) = decode.ready["pids"]
    name, answer = decode.begin(prompt(40, 50), {"max_tokens": 900})
    await decode.until(lambda: answer.outputs)
    os.kill(engine, signal.SIGKILL)
    await decode.until(lambda: answer.last and "died" in decode.kinds())
    assert answer.last["finish"] == "error", name


def refusal(engine):
    (refused,) = [news for news in engine.said if news["kind"] == "refused"]
    return refused["message"]


async def test_a_start_that_cannot_be_is_refused_with_a_clear_line(start_engine, tmp_path):
    missing = await start_engine("nowhere", model_path=str(tmp_path / "nothing"))
    assert "is no directory: name a directory with config.json" in refusal(missing)
    tiny = await start_engine("tiny", kv_cache_bytes=1 << 10)
    assert "its engine process failed with ValueError: No available memory for the cache blocks" in refusal(tiny)
