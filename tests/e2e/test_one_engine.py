"""What one vLLM engine gives alone, a handover gives too, and an answer that goes on elsewhere: float32, so that tokens
can be compared, and greedy or seeded.
"""

import asyncio
import itertools
import json
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from planes.wire.frames import DecodeLeg, PrefillLeg, StructuredOutput
from planes.wire.messages import HandoverMode
from tests.e2e.stack import MOST_JSON_TOKENS
from tests.e2e.thinking_model import END_THINK, THINK
from workers.vllm.requirements import eos_tokens

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}
CALLS = {
    "type": "array",
    "minItems": 1,
    "maxItems": 1,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": "get_weather"}, "parameters": {"$ref": "#/$defs/weather"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"name": {"const": "get_time"}, "parameters": {"$ref": "#/$defs/time"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            },
        ]
    },
    "$defs": {
        "weather": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 16}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "time": {
            "type": "object",
            "properties": {"zone": {"type": "string", "pattern": "^[A-Z]{3}$"}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
"""What `tool_choice: required` comes to."""
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<call>",
        "content": {"type": "json_schema", "json_schema": {"type": "object", "properties": {}, "required": []}},
        "end": "</call>",
    },
}
THOUGHTS: Any = {"has_reasoning": True}
QUESTIONS = ("Tell me of a person.", "JSON, please:", "Who is Ada?", "The weather in Rome?", "{", "A list of colours:")


def schema(value):
    return StructuredOutput(json_schema=json.dumps(value))


@pytest.fixture(scope="module")
def tokenizer(thinking_model):
    return Tokenizer.from_file(str(thinking_model / "tokenizer.json"))


async def hand_over(pair, prompt, sampling, *, name, is_first_early, parsing=None):
    """Both legs of one request. Returns all tokens, and the last leg's answer."""
    mode, prefill, decode = pair
    leg = msgspec.to_builtins(PrefillLeg(mode, emit_first=is_first_early))
    if mode is HandoverMode.PUSH:
        taking = msgspec.to_builtins(DecodeLeg(source=prefill.endpoint))
        _, answer = await asyncio.gather(
            prefill.run(prompt, sampling, leg, name=name, parsing=parsing),
            decode.run(prompt, sampling, taking, name=name, parsing=parsing),
        )
        return answer.tokens, answer
    first = await prefill.run(prompt, sampling, leg, name=name, parsing=parsing)
    if first.ticket is None:
        return first.tokens, first
    resume = first.tokens if is_first_early else []
    taking = msgspec.to_builtins(DecodeLeg(ticket=first.ticket))
    answer = await decode.run(prompt, sampling, taking, resume=resume, name=name, parsing=parsing)
    return resume + answer.tokens, answer


def variations(base, end):
    """Sampling fields that requests differ in. base: what is said without any.  end: the end-of-sequence token."""
    seeded = {"temperature": 1.0, "seed": 11}
    yield from ({"max_tokens": n} for n in (1, 2, 3, 16))
    yield from ({"stop_token_ids": [base[place]]} for place in (0, 1, 4))
    yield from ({"stop_token_ids": [base[0]], "min_tokens": n} for n in (1, 3, 8))
    yield from ({"logit_bias": {end: 100.0}} | more for more in ({}, {"ignore_eos": True}, {"min_tokens": 4}))
    yield from ({"logit_bias": {base[place]: -100.0}} for place in (0, 1, 3))
    yield {"logit_bias": {base[0]: 2.5, base[1]: -2.5}}
    yield from ({"bad_words": words} for words in ([base[:1]], [base[:2]], [base[1:4]], [base[:3], base[2:4]]))
    yield {"bad_words": [[base[0], token] for token in base[1:]]}
    yield from ({"presence_penalty": value} for value in (-1.0, 0.8, 2.0))
    yield from ({"frequency_penalty": value} for value in (-0.5, 0.8, 2.0))
    yield from ({"repetition_penalty": value} for value in (0.8, 1.2, 2.0))
    yield {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2}
    yield from ({"logprobs": n} for n in (0, 1, 5))
    yield from ({"temperature": t, "seed": 5} for t in (0.2, 0.7, 1.0, 1.3, 2.0))
    yield from ({"temperature": 1.0, "seed": seed} for seed in (0, 1, 2**31))
    yield from (seeded | {"top_p": p} for p in (0.1, 0.9))
    yield from (seeded | {"top_k": k} for k in (1, 5, 50))
    yield from (seeded | {"min_p": p} for p in (0.05, 0.5))
    yield from (seeded | more for more in ({"presence_penalty": 1.0}, {"repetition_penalty": 1.3}, {"logprobs": 2}))
    yield from (
        seeded | more for more in ({"min_tokens": 8}, {"bad_words": [base[:1]]}, {"logit_bias": {base[0]: 3.0}})
    )
    for structured in (
        schema(PERSON),
        schema(CALLS),
        schema({"type": "object"}),
        schema({"type": "integer", "multipleOf": 7}),
        StructuredOutput(regex="(yes|no|[a-f]{3,5})!"),
        StructuredOutput(choice=["sun", "rain", 'a "storm"']),
        StructuredOutput(grammar='root ::= "<" [a-z]+ ">" root | "end"'),
        StructuredOutput(grammar='start: "a" start "b" | "c"'),
        StructuredOutput(structural_tag=json.dumps(TAG)),
    ):
        yield {"structured": structured}
        yield seeded | {"structured": structured}
    yield {"structured": schema(PERSON), "repetition_penalty": 1.3, "min_tokens": 8}
    yield {"structured": schema(PERSON), "bad_words": [base[:1]], "logprobs": 1}


def thinking_variations():
    """Budgets of thoughts, which end with a token that costs a sentence its full stop; some before the budget does."""
    lasting = {"logit_bias": {END_THINK: -100.0}, "max_tokens": 16}
    yield from (lasting | {"thinking_tokens": budget} for budget in (0, 1, 2, 7, 100))
    yield from (lasting | {"thinking_tokens": n, "temperature": 1.0, "seed": 8} for n in (0, 3))
    yield {"logit_bias": {END_THINK: 3.0}, "max_tokens": 16, "thinking_tokens": 14}
    yield lasting | {"thinking_tokens": 3, "structured": schema(PERSON), "max_tokens": 24}
    yield lasting | {"thinking_tokens": 3, "min_tokens": 9, "repetition_penalty": 1.2, "logprobs": 1}


async def test_what_requests_differ_in_gives_what_one_engine_gives(pair, thinking_model, tokenizer):
    mode, prefill, _ = pair
    facts, rng = prefill.ready["facts"], np.random.default_rng(7)
    block_size, first_word = facts["block_size"], 1000

    def prompt(num_tokens):
        return rng.integers(first_word, min(facts["vocab_size"], 40_000), num_tokens).tolist()

    base = await prefill.run(shared := prompt(45), {"ignore_eos": True}, salt="base")
    cases = [(shared, fields, None) for fields in variations(base.tokens, eos_tokens(thinking_model)[0])]
    cases += [(prompt(num_tokens), {}, None) for num_tokens in (1, 2, block_size, 3 * block_size, 130)]
    cases += [(prompt(num_tokens), {"temperature": 1.0, "seed": 3}, None) for num_tokens in (block_size, 130)]
    question = tokenizer.encode("Tell me about rivers.").ids
    for opened in ([*question, THINK], question):  # without, it may begin thoughts itself
        cases += [(opened, fields, THOUGHTS) for fields in thinking_variations()]
    assert len(cases) >= 80
    room = asyncio.Semaphore(8)

    async def compare(number, tokens, fields, parsing):
        async with room:
            alone = await prefill.run(tokens, fields, salt=f"alone {number}", parsing=parsing)
            is_early = mode is HandoverMode.PULL and number % 4 != 0
            said, last = await hand_over(
                pair, tokens, fields, name=f"case-{number}", is_first_early=is_early, parsing=parsing
            )
        assert said == alone.tokens, fields
        assert last.last["finish"] == alone.last["finish"], fields
        told = [entry for output in last.outputs for entry in output["logprobs"]]
        expected = [entry for output in alone.outputs for entry in output["logprobs"]]
        for entry, other in zip(told[::-1], expected[::-1], strict=False):
            assert entry["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
            assert [token for token, _ in entry["top"]] == [token for token, _ in other["top"]]

    await asyncio.gather(*(compare(number, *case) for number, case in enumerate(cases)))


async def test_json_that_is_handed_over_validates_whatever_is_drawn(pair, tokenizer):
    (line_break,) = tokenizer.encode("\n").ids
    drawn = itertools.product(QUESTIONS, (PERSON, CALLS), ({"temperature": 1.0, "seed": 1}, {"temperature": 1.0}))
    likeliest = itertools.product(QUESTIONS[:1], (PERSON, CALLS), ({}, {"logit_bias": {line_break: 100.0}}))
    room = asyncio.Semaphore(8)

    async def ask(number, question, wanted, sampling):
        prompt = tokenizer.encode(question).ids
        fields = {"max_tokens": MOST_JSON_TOKENS, "structured": schema(wanted)} | sampling
        async with room:
            said, last = await hand_over(pair, prompt, fields, name=f"json-{number}", is_first_early=number % 2 == 0)
        text = tokenizer.decode(said)
        assert last.last["finish"] == "stop", text
        jsonschema.validate(json.loads(text), wanted)

    await asyncio.gather(*(ask(number, *case) for number, case in enumerate([*drawn, *likeliest])))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 9}, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("wanted", [PERSON, CALLS], ids=["json", "call"])
async def test_an_answer_that_goes_on_on_another_engine_amid_json_is_the_undisturbed_one(
    pair, tokenizer, wanted, sampling
):
    mode, prefill, decode = pair
    if mode is HandoverMode.PUSH:
        return  # a local leg: the same code
    prompt = tokenizer.encode("A person and the weather, as JSON:").ids
    fields = {"max_tokens": 40, "structured": schema(wanted)} | sampling
    alone = await prefill.run(prompt, fields)
    places = range(1, len(alone.tokens), 3)
    rests = await asyncio.gather(*(decode.run(prompt, fields, resume=alone.tokens[:place]) for place in places))
    assert [alone.tokens[:place] + rest.tokens for place, rest in zip(places, rests, strict=True)] == [
        alone.tokens for _ in places
    ]
    assert {rest.last["finish"] for rest in rests} == {alone.last["finish"]}


@pytest.mark.parametrize("wanted", [{}, {"structured": schema(PERSON)}], ids=["text", "json"])
@pytest.mark.parametrize("budget", [0, 1, 9])
async def test_a_thinking_budget_is_one_answer_s_wherever_it_goes_on(pair, tokenizer, budget, wanted):
    mode, prefill, decode = pair
    if mode is HandoverMode.PUSH:
        return  # a local leg: the same code
    prompt = [*tokenizer.encode("Tell me about rivers.").ids, THINK]
    fields = {"logit_bias": {END_THINK: -100.0}, "max_tokens": 30, "thinking_tokens": budget} | wanted
    alone = await prefill.run(prompt, fields, parsing=THOUGHTS)
    assert alone.tokens.index(END_THINK) == budget
    assert alone.tokens.count(END_THINK) == 1
    if wanted:
        assert tokenizer.decode(alone.tokens[budget + 1 :]).lstrip().startswith("{")
    places = [place for place in range(1, len(alone.tokens)) if place <= budget + 3 or place % 4 == 0]
    rests = await asyncio.gather(
        *(decode.run(prompt, fields, resume=alone.tokens[:place], parsing=THOUGHTS) for place in places)
    )
    assert [alone.tokens[:place] + rest.tokens for place, rest in zip(places, rests, strict=True)] == [
        alone.tokens for _ in places
    ]


BORNE_WITH_A_SMALL_VOCABULARY = [
    schema({"type": "string", "maxLength": 1_000_000_000}),
    StructuredOutput(regex="[\\w\\W]{1,100000}"),
]
"""Too much for the limits of a trial where there are 262,144 tokens, and not where there are 49,152."""


@pytest.mark.parametrize(
    "structured",
    [
        *BORNE_WITH_A_SMALL_VOCABULARY,
        schema({"type": "array", "minItems": 1_000_000_000}),
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        schema({"type": "nonsense"}),
        schema({"type": "array", "uniqueItems": True, "patternProperties": {}}),
        StructuredOutput(regex="("),
        StructuredOutput(regex=".*" * 2000),
        StructuredOutput(grammar="root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
        StructuredOutput(structural_tag="{}"),
    ],
    ids=lambda structured: str(structured)[:60],
)
async def test_a_hostile_grammar_costs_its_request_and_nobody_else(pair, structured):
    mode, prefill, _ = pair
    if mode is HandoverMode.PUSH:
        return  # the same code
    refused, other = await asyncio.gather(
        prefill.run([1000, 1001], {"structured": structured}), prefill.run([1002, 1003], {"max_tokens": 3})
    )
    if structured in BORNE_WITH_A_SMALL_VOCABULARY and not refused.last.get("refusal"):
        assert refused.last["finish"] in ("length", "stop"), refused.last["error"]
    else:
        assert "cannot be used" in refused.last["refusal"]
    assert other.last["finish"] in ("length", "stop")


async def test_a_seeded_prompt_of_several_steps_gives_what_one_step_gives(pair):
    mode, prefill, decode = pair
    if mode is HandoverMode.PUSH:
        return  # the same code
    prompt, fields = list(range(2000, 2150)), {"temperature": 1.0, "seed": 4}
    assert decode.ready["facts"]["max_step_tokens"] < len(prompt) < prefill.ready["facts"]["max_step_tokens"]
    assert (await decode.run(prompt, fields)).tokens == (await prefill.run(prompt, fields)).tokens


async def test_what_a_request_resumes_with_may_be_cached_as_far_as_it_goes(pair):
    mode, _, decode = pair
    if mode is HandoverMode.PUSH:
        return  # the same code
    prompt, fields = list(range(3000, 3050)), {"max_tokens": 80, "ignore_eos": True}
    alone = await decode.run(prompt, fields)
    again = await decode.run(prompt, fields, resume=alone.tokens[:70])
    assert alone.tokens[:70] + again.tokens == alone.tokens
    assert again.last["cached_tokens"] == len(prompt)  # and 46 of those that are none of the prompt


async def test_prompt_logprobs_are_told_once_for_each_token(pair):
    mode, prefill, _ = pair
    if mode is HandoverMode.PUSH:
        return  # the same code
    prompt = list(range(4000, 4020))
    answer = await prefill.run(prompt, {"prompt_logprobs": 2, "max_tokens": 3})
    first, *others = [output["prompt_logprobs"] for output in answer.outputs]
    assert first[0] is None
    assert [entry["token"] for entry in first[1:]] == prompt[1:]
    assert all(len(entry["top"]) == 2 for entry in first[1:])
    assert not any(others)


async def test_prompt_logprobs_of_several_steps_are_those_of_one_step(pair, tokenizer):
    mode, prefill, decode = pair
    if mode is HandoverMode.PUSH:
        return  # the same code
    prompt, fields = tokenizer.encode("Rivers carry water to the sea, and boats. " * 12).ids, {"prompt_logprobs": 2}
    assert decode.ready["facts"]["max_step_tokens"] < len(prompt) < prefill.ready["facts"]["max_step_tokens"]
    chunked, whole = await asyncio.gather(decode.run(prompt, fields), prefill.run(prompt, fields))
    told, expected = chunked.outputs[0]["prompt_logprobs"], whole.outputs[0]["prompt_logprobs"]
    assert told[0] is expected[0] is None
    for entry, other in zip(told[1:], expected[1:], strict=True):
        assert (entry["token"], entry["rank"]) == (other["token"], other["rank"])
        assert entry["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
        assert entry["top"][0][0] == other["top"][0][0]
