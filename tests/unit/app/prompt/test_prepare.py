import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.prompt.prepare import (
    ContextExceeded,
    ModelEntry,
    PreparationTimeout,
    Preprocessor,
    TokenizersBusy,
    chat_template_of,
)
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer
from planes.wire import blocks
from planes.wire.errors import InvalidRequest

SIM = Path("workers/sim/model")
CONFIG = json.loads((SIM / "tokenizer_config.json").read_text())


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer((SIM / "tokenizer.json").read_bytes(), CONFIG)
    template = ChatTemplate(chat_template_of(CONFIG), tokenizer.special_tokens, variables=tokenizer.variables)
    return ModelEntry("sim", tokenizer, template, context_length=512, block_size=16, vocab_size=tokenizer.vocab_size)


@pytest.fixture
def preprocessor():
    preprocessor = Preprocessor()
    yield preprocessor
    preprocessor.close()


def chat(content="hi", **fields):
    body = {"model": "sim", "messages": [{"role": "user", "content": content}], **fields}
    return parse_chat(json.dumps(body).encode())


def completion(prompt, **fields):
    return parse_completion(json.dumps({"model": "sim", "prompt": prompt, **fields}).encode())


async def test_a_chat_becomes_tokens_blocks_and_the_room_that_is_left(preprocessor, model):
    prepared = await preprocessor.prepare(chat("hello"), model)
    assert model.tokenizer.decode(prepared.tokens).endswith("hello<|end_of_turn|>\n<|turn|>assistant\n")
    assert prepared.sampling.max_tokens == 512 - len(prepared.tokens)
    expected = blocks.name_blocks(prepared.tokens, 16, blocks.root("sim"))
    assert len(expected) == len(prepared.tokens) // 16
    assert np.array_equal(prepared.blocks, expected)


async def test_a_long_prompt_on_a_thread_gives_the_same_as_on_the_loop(model):
    on_thread, on_loop = Preprocessor(inline_bytes=0), Preprocessor()
    parsed = chat("words " * 40)
    threaded, inline = await on_thread.prepare(parsed, model), await on_loop.prepare(parsed, model)
    assert np.array_equal(threaded.tokens, inline.tokens)
    assert np.array_equal(threaded.blocks, inline.blocks)
    on_thread.close()
    on_loop.close()


@pytest.mark.parametrize("prompt", ["words " * 40, [1] * 100], ids=["text", "token ids"])
async def test_whatever_is_long_is_parsed_and_prepared_off_the_event_loop(model, prompt):
    threads = []

    class Watched(Tokenizer):
        def __init__(self, tokenizer):
            self.__dict__.update(tokenizer.__dict__)

        def decode(self, tokens):
            threads.append(threading.current_thread())
            return super().decode(tokens)

        def encode_prompt(self, text):
            threads.append(threading.current_thread())
            return super().encode_prompt(text)

    def parse(body):
        threads.append(threading.current_thread())
        return parse_completion(body)

    body = json.dumps({"model": "sim", "prompt": prompt, "echo": True}).encode()
    for inline_bytes, is_inline in ((len(body) - 1, False), (len(body), True)):
        preprocessor = Preprocessor(inline_bytes=inline_bytes)
        threads.clear()
        parsed = await preprocessor.parse(parse, body)
        await preprocessor.prepare(parsed, replace(model, tokenizer=Watched(model.tokenizer)))
        assert [each is threading.main_thread() for each in threads] == [is_inline] * 2
        preprocessor.close()


async def test_a_prompt_whose_time_is_over_before_a_thread_had_it_is_refused(model):
    preprocessor = Preprocessor(inline_bytes=0, num_threads=1)
    going = threading.Event()
    blocking = asyncio.create_task(preprocessor.parse(lambda body: going.wait(), b"x"))
    await asyncio.sleep(0)
    now = asyncio.get_running_loop().time()
    with pytest.raises(PreparationTimeout):
        await preprocessor.parse(lambda body: body, b"x", deadline=now)
    with pytest.raises(PreparationTimeout):
        await preprocessor.prepare(chat(), model, deadline=now)
    going.set()
    assert await blocking
    preprocessor.close()


async def test_a_prompt_of_exactly_the_context_leaves_no_room(preprocessor, model):
    error = await refused(preprocessor, completion([1] * 512, max_tokens=None), model)
    assert "your prompt has 512 tokens, which leaves no room" in str(error)
    assert (await preprocessor.prepare(completion([1] * 511, max_tokens=1), model)).sampling.max_tokens == 1


async def test_prompts_with_other_salts_share_no_block(preprocessor, model):
    plain = await preprocessor.prepare(chat("x" * 100), model)
    salted = await preprocessor.prepare(chat("x" * 100, cache_salt="s"), model)
    tenant = await preprocessor.prepare(chat("x" * 100, cache_salt="s"), model, cache_salt="1:ts")
    assert (plain.cache_salt, salted.cache_salt, tenant.cache_salt) == ("", "s", "1:ts")
    assert not set(plain.blocks.tolist()) & set(salted.blocks.tolist()) & set(tenant.blocks.tolist())


async def test_token_ids_are_taken_as_they_are(preprocessor, model):
    prepared = await preprocessor.prepare(completion([1, 2, 259]), model)
    assert prepared.tokens.tolist() == [1, 2, 259]
    assert prepared.sampling.max_tokens == 16


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
async def test_echo_gives_the_prompts_text_back(preprocessor, model, prompt):
    assert (await preprocessor.prepare(completion(prompt, echo=True), model)).echo == "ab"
    assert (await preprocessor.prepare(completion(prompt), model)).echo == ""


async def refused(preprocessor, parsed, model):
    with pytest.raises(InvalidRequest) as caught:
        await preprocessor.prepare(parsed, model)
    return caught.value


async def test_prompt_and_completion_beyond_the_context_are_refused_in_openais_words(preprocessor, model):
    error = await refused(preprocessor, completion([1] * 500, max_tokens=13), model)
    assert str(error).startswith(
        "This model's maximum context length is 512 tokens. However, you requested 513 tokens "
        "(500 in the prompt, 13 in the completion)."
    )
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")


async def test_prompt_and_completion_that_just_fit_are_accepted(preprocessor, model):
    prepared = await preprocessor.prepare(completion([1] * 500, max_tokens=12), model)
    assert prepared.sampling.max_tokens == 12


async def test_a_prompt_that_leaves_no_room_is_refused(preprocessor, model):
    error = await refused(preprocessor, chat("é" * 256), model)
    assert "leaves no room for a completion" in str(error)
    assert (error.code, error.param) == ("context_length_exceeded", "messages")


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(preprocessor, model):
    error = await refused(preprocessor, completion("x" * 17 * 512), model)
    assert "8704 characters, which are at least 512 tokens" in str(error)
    assert isinstance(error, ContextExceeded)


async def test_min_tokens_beyond_the_room_are_refused(preprocessor, model):
    error = await refused(preprocessor, chat(min_tokens=512), model)
    assert error.param == "min_tokens"


async def test_an_empty_prompt_is_refused(preprocessor, model):
    assert "no tokens" in str(await refused(preprocessor, completion(""), model))


@pytest.mark.parametrize(
    ("parsed", "param"),
    [
        (completion([1, 260]), "prompt"),
        (chat(stop_token_ids=[260]), "stop_token_ids"),
        (chat(logit_bias={"260": 1}), "logit_bias"),
    ],
)
async def test_token_ids_outside_the_vocabulary_are_refused(preprocessor, model, parsed, param):
    error = await refused(preprocessor, parsed, model)
    assert error.param == param
    assert "token id 260 is not in the vocabulary, which ends at 259" in str(error)


async def test_a_chat_with_a_model_without_template_is_refused(preprocessor, model):
    error = await refused(preprocessor, chat(), replace(model, template=None))
    assert error.code == "no_chat_template"


class SlowTokenizer:
    """Encodes nothing until told to."""

    max_chars_per_token = None

    def __init__(self):
        self.may_go = threading.Event()

    def encode_prompt(self, text):
        self.may_go.wait()
        return np.zeros(len(text), dtype=np.uint32)


async def test_long_prompts_do_not_block_the_loop_and_their_number_is_bounded(model):
    slow = SlowTokenizer()
    preprocessor = Preprocessor(inline_bytes=0, num_threads=1, max_waiting=2)
    entry = replace(model, tokenizer=slow)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(preprocessor.prepare(completion("ab"), entry)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(TokenizersBusy, match="limit is 2"):
            await preprocessor.prepare(completion("ab"), entry)
        slow.may_go.set()
    assert [len(task.result().tokens) for task in tasks] == [2, 2]
    assert len((await preprocessor.prepare(completion("ab"), entry)).tokens) == 2
    preprocessor.close()


async def test_a_cancelled_request_gives_its_place_back(model):
    slow = SlowTokenizer()
    preprocessor = Preprocessor(inline_bytes=0, num_threads=1, max_waiting=1)
    entry = replace(model, tokenizer=slow)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(preprocessor.prepare(completion("ab"), entry))
        await asyncio.sleep(0)
        task.cancel()
    slow.may_go.set()
    assert len((await preprocessor.prepare(completion("ab"), entry)).tokens) == 2
    preprocessor.close()


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({}, None),
        ({"chat_template": "x"}, "x"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None),
        ({"chat_template": 3}, None),
    ],
)
def test_the_template_is_found_in_the_configuration(config, source):
    assert chat_template_of(config) == source
