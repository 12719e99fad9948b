import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.openai.bodies import CompletionBody
from app.openai.completions import parse_completion
from app.openai.schema import Kind, ParsedRequest
from planes.wire.errors import InvalidRequest


def parse(**fields):
    return parse_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def refusal(**fields):
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    return caught.value


def test_a_plain_completion_gets_openai_defaults():
    parsed = parse()
    assert (parsed.kind, parsed.prompt, parsed.max_tokens, parsed.echo) == (Kind.COMPLETION, "hi", 16, False)
    assert parsed.sampling.logprobs is None


def test_token_ids_become_an_array():
    parsed = parse(prompt=[1, 2, 4294967295])
    assert isinstance(parsed.prompt, np.ndarray)
    assert parsed.prompt.dtype == np.uint32
    assert parsed.prompt.tolist() == [1, 2, 4294967295]


@pytest.mark.parametrize(("prompt", "meant"), [(["hi"], "hi"), ([[5, 6]], [5, 6])])
def test_a_list_of_one_prompt_is_that_prompt(prompt, meant):
    parsed = parse(prompt=prompt).prompt
    assert (parsed if isinstance(parsed, str) else parsed.tolist()) == meant


def test_several_prompts_are_each_one():
    parsed = parse(prompt=["a", [5, 6], "b"])
    assert parsed.prompt == "a"
    assert parsed.more_prompts[0].tolist() == [5, 6]
    assert parsed.more_prompts[1] == "b"


def test_an_echo_with_log_probabilities_asks_for_those_of_the_prompt():
    assert parse(echo=True, logprobs=3).sampling.prompt_logprobs == 3
    assert parse(echo=True, logprobs=1, prompt_logprobs=2).sampling.prompt_logprobs == 2
    assert parse(logprobs=3).sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (["a"] * 129, "129 prompts were given and the limit is 128"),
        (["a", 7], "'prompt[1]': expected str or array, got int; the value is 7"),
        ([], "must not be an empty list"),
        ([[]], "at least one token id"),
        ([1, "a"], "mixes token ids with"),
        ([1, [2]], "mixes token ids with"),
        ([-1], "-1 is out of range"),
        ([2**32], "out of range"),
        ([10**40], "out of range"),
        ([1.5], "got float"),
        ([True], "got bool"),
        (None, "got null"),
        ({"a": 1}, "got object"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_refused(prompt, said):
    error = refusal(prompt=prompt)
    assert said in str(error)
    assert error.param in {"prompt", "prompt[0]", "prompt[1]"}


@pytest.mark.parametrize("num", [1, 9_999, 10_000, 50_000])
@pytest.mark.parametrize("separators", [(",", ":"), (" ,\n ", ":")])
def test_long_lists_of_ids_come_out_whole(num, separators):
    ids = [(i * 7919) % 2**32 for i in range(num)]
    body = json.dumps({"prompt": ids, "model": "m"}, separators=separators).encode()
    assert parse_completion(body).prompt.tolist() == ids
    assert parse_completion(body.replace(b"[", b"[ [").replace(b"]", b"] ]")).prompt.tolist() == ids


@pytest.mark.parametrize("at", [0, 5, 12_345, 49_999])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("x,y", 'mixes token ids with "x,y"'),
        ([1, 2], "mixes token ids with [1,2]"),
        (1.5, "'prompt[{at}]': expected int, got float; the value is 1.5"),
        (None, "'prompt[{at}]': expected int, got null"),
        ({"a": [1, 2]}, "'prompt[{at}]': expected int, got object"),
        (True, "'prompt[{at}]': expected int, got bool; the value is true"),
        ("x" * 100_000, "mixes token ids with"),
    ],
)
def test_what_is_wrong_in_a_long_list_is_named_with_its_place(at, wrong, said):
    ids = [7] * 50_000
    ids[at] = wrong
    error = refusal(prompt=ids)
    if at or not isinstance(wrong, str | list):
        assert said.format(at=at) in str(error)
    assert len(str(error)) < 300


def test_ids_out_of_range_are_found_in_every_piece():
    for wrong in (-1, 2**32, 10**40):
        assert "out of range" in str(refusal(prompt=[7] * 50_000 + [wrong]))


@pytest.mark.parametrize("prompt", [b'"\xff"', b'["\xff"]', b'[1, "\xff"]'])
def test_a_prompt_that_is_no_utf_8_is_refused(prompt):
    with pytest.raises(InvalidRequest):
        parse_completion(b'{"model": "m", "prompt": %b}' % prompt)


def test_a_prompt_that_is_missing_is_named():
    with pytest.raises(InvalidRequest, match="Missing required parameter: 'prompt'"):
        parse_completion(b'{"model": "m"}')


def test_logprobs_are_a_number_here():
    assert parse(logprobs=3).sampling.logprobs == 3
    assert "from 0 to 20" in str(refusal(logprobs=21))


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"), ({"echo": True, "logprobs": 1, "stream": True}, "echo")],
)
def test_what_cannot_be_done_is_refused_by_name(fields, param):
    error = refusal(**fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize("fields", [{"best_of": 1}, {"suffix": ""}, {"suffix": None}, {"echo": True}])
def test_values_that_ask_for_nothing_more_are_accepted(fields):
    assert isinstance(parse(**fields), ParsedRequest)


def test_max_tokens_of_zero_is_refused():
    assert refusal(max_tokens=0).param == "max_tokens"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(name=st.sampled_from(CompletionBody.__struct_fields__), value=json_values)
def test_any_value_in_any_field_is_parsed_or_refused(name, value):
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse(**{name: value}), ParsedRequest)


def test_what_the_answer_shall_keep_arrives_in_seconds():
    parsed = parse(slo_ttft_ms=250, slo_itl_ms=40)
    assert (parsed.slo_ttft_s, parsed.slo_itl_s) == (0.25, 0.04)
    assert refusal(slo_itl_ms=0).param == "slo_itl_ms"
