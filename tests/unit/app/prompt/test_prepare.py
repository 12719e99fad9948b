import asyncio
import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from app.anthropic.message import parse_message
from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.openai.embeddings import parse_embedding
from app.prompt.prepare import (
    ContextExceeded,
    PreparationTimeout,
    Preprocessor,
    TokenizersBusy,
)
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer
from planes.wire import blocks
from planes.wire.errors import InvalidRequest
from tests.sim_model import CONFIG, SIM, sim_model


@pytest.fixture(scope="module")
def model():
    return sim_model(context_length=512)


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
    now = 1e9  # not the event loop's
    preprocessor = Preprocessor(inline_bytes=0, num_threads=1, clock=lambda: now)
    going = threading.Event()
    blocking = asyncio.create_task(preprocessor.parse(lambda body: going.wait(), b"x"))
    await asyncio.sleep(0)
    work = (
        lambda: preprocessor.parse(lambda body: body, b"x", deadline=now),
        lambda: preprocessor.prepare(chat(), model, deadline=now),
    )
    try:
        for waiting in work:
            with pytest.raises(PreparationTimeout):
                await asyncio.wait_for(waiting(), 60)
    finally:
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


def embedding(text, **fields):
    return parse_embedding(json.dumps({"model": "sim", "input": text, **fields}).encode()).parsed


async def test_a_message_may_be_bounded_by_more_than_there_is_room_for(preprocessor, model):
    def message(content):
        body = {"model": "sim", "max_tokens": 32_000, "messages": [{"role": "user", "content": content}]}
        return parse_message(json.dumps(body).encode())

    prepared = await preprocessor.prepare(message("hi"), model)
    assert len(prepared.tokens) + prepared.sampling.max_tokens == 512
    with pytest.raises(ContextExceeded):
        await preprocessor.prepare(message("hi" * 512), model)


async def test_a_vector_takes_the_whole_context_and_no_more(preprocessor, model):
    for given in ([1] * 512, "x" * 512):
        assert len((await preprocessor.prepare(embedding(given), model)).tokens) == 512
    for given in ([1] * 513, "x" * 513):
        error = await refused(preprocessor, embedding(given), model)
        assert str(error).startswith("This model's maximum context length is 512 tokens. However, your input has 513")
        assert (error.code, error.param) == ("context_length_exceeded", "input")
    cut = await preprocessor.prepare(embedding("x" * 600, truncate_prompt_tokens=-1), model)
    assert len(cut.tokens) == 512
    assert "at least 513 tokens" in str(await refused(preprocessor, embedding("x" * (17 * 512 + 1)), model))


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


async def test_a_cancelled_request_gives_its_place_back_once_no_thread_works_on_it():
    preprocessor, begun, may_end = Preprocessor(num_threads=1, max_waiting=2), threading.Event(), threading.Event()

    def slow(body):
        begun.set()
        may_end.wait()
        return len(body)

    def under_way(body):
        return asyncio.create_task(preprocessor.run(slow, body, num_bytes=1 << 20))

    running = under_way(b"ab")
    await asyncio.to_thread(begun.wait)
    for _ in range(3):
        waiting = under_way(b"abc")
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert preprocessor._threads._work_queue.empty(), "what nobody waits for is kept for no thread"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    last = under_way(b"abcd")
    await asyncio.sleep(0)
    with pytest.raises(TokenizersBusy, match="limit is 2"):
        await under_way(b"ab")
    may_end.set()
    assert await last == 4
    assert await under_way(b"ab") == 2
    preprocessor.close()


def speaking(model, source):
    return replace(
        model, template=ChatTemplate(source, model.tokenizer.special_tokens, variables=model.tokenizer.variables)
    )


async def test_tools_and_documents_reach_the_template(preprocessor, model):
    tool = {"type": "function", "function": {"name": "weather"}}
    document = {"title": "t", "text": "x"}
    source = "{{ tools | tojson }}{{ documents | tojson }}{{ messages[-1].content }}"
    prepared = await preprocessor.prepare(chat(tools=[tool], documents=[document]), speaking(model, source))
    told = model.tokenizer.decode(prepared.tokens)
    assert told == json.dumps([tool]) + json.dumps([document]) + "hi"
    plain = await preprocessor.prepare(chat(), speaking(model, source))
    assert model.tokenizer.decode(plain.tokens) == "nullnullhi"


async def test_a_template_that_needs_objects_gets_one_for_arguments_that_are_none(preprocessor, model):
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    calls = [
        {"id": "1", "function": {"name": "f", "arguments": arguments}} for arguments in ('{"x": 1}', '{"x": "cut o')
    ]
    parsed = parse_chat(json.dumps({"model": "sim", "messages": [{"role": "assistant", "tool_calls": calls}]}).encode())
    prepared = await preprocessor.prepare(parsed, speaking(model, source))
    assert model.tokenizer.decode(prepared.tokens) == 'x=1;arguments={"x": "cut o;'


async def test_a_template_that_fails_for_another_reason_fails(preprocessor, model):
    with pytest.raises(InvalidRequest, match="no good"):
        await preprocessor.prepare(chat(), speaking(model, "{{ raise_exception('no good') }}"))


@pytest.mark.parametrize("keep", [1, 5, 1000])
async def test_a_truncated_prompt_is_its_end(preprocessor, model, keep):
    whole = await preprocessor.prepare(completion("one two three four five six seven"), model)
    cut = await preprocessor.prepare(
        completion("one two three four five six seven", truncate_prompt_tokens=keep), model
    )
    assert cut.tokens.tolist() == whole.tokens.tolist()[-keep:]


async def test_a_prompt_can_be_cut_to_what_leaves_room_for_the_answer(preprocessor, model):
    parsed = completion("word " * 5000, truncate_prompt_tokens=-1, max_tokens=12)
    prepared = await preprocessor.prepare(parsed, model)
    assert (len(prepared.tokens), prepared.sampling.max_tokens) == (500, 12)


async def test_a_bad_word_is_one_at_the_beginning_and_after_a_space(preprocessor, model):
    prepared = await preprocessor.prepare(chat(bad_words=[" bad", "zz top"]), model)
    sequences = [model.tokenizer.decode(np.array(ids, dtype=np.uint32)) for ids in prepared.sampling.bad_words]
    assert sequences[0] == "bad"
    assert "zz top" in sequences
    spaced = [text for text in sequences if text.startswith(" ")]
    for text in spaced:  # only where it takes as many tokens
        assert len(model.tokenizer.encode_text(text)) == len(model.tokenizer.encode_text(text[1:]))


async def test_more_choices_than_any_worker_runs_at_once_are_refused(preprocessor, model):
    with pytest.raises(InvalidRequest, match="run 8 sequences at once") as caught:
        await preprocessor.prepare(chat(n=9), replace(model, max_batch=8))
    assert caught.value.param == "n"
    assert (await preprocessor.prepare(chat(n=8), replace(model, max_batch=8))).sampling.n == 8


async def test_a_line_for_billing_is_dropped_unless_it_shall_be_kept(model):
    def asked(line):
        messages = [{"role": "system", "content": f"{line}You code."}, {"role": "user", "content": "hi"}]
        return parse_chat(json.dumps({"model": "sim", "messages": messages}).encode())

    preprocessors = [Preprocessor(), Preprocessor(keeps_nonces=True)]
    texts = []
    for preprocessor in preprocessors:
        prepared = await preprocessor.prepare(asked("x-a-billing-header: 7\n"), model)
        plain = await preprocessor.prepare(asked(""), model)
        texts.append(prepared.tokens.tolist() == plain.tokens.tolist())
        preprocessor.close()
    assert texts == [True, False]


async def test_a_plain_prompt_has_nothing_around_it(model):
    config = CONFIG | {"add_bos_token": True}
    dressing = replace(model, tokenizer=Tokenizer((SIM / "tokenizer.json").read_bytes(), config))
    prepare, parsed = Preprocessor(), parse_completion(b'{"model": "sim", "prompt": "ab"}')
    assert len(await prepare.tokenize(parsed, dressing)) == 3
    assert (await prepare.tokenize(parsed, dressing, is_plain=True)).tolist() == list(b"ab")
    prepare.close()
