import contextlib
import inspect
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.openai import sampling
from app.openai.bodies import ChatBody
from app.openai.chat import parse_chat
from app.openai.schema import Kind, Limits, ParsedRequest
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Sampling

JSON_OBJECT = {"type": "json_object"}
USER = {"role": "user", "content": "hi"}


def parse(**fields):
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def refusal(**fields):
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    return caught.value


def test_a_plain_chat_gets_openai_defaults():
    parsed = parse()
    assert parsed.kind is Kind.CHAT
    assert parsed.model == "m"
    assert parsed.messages == (USER,)
    assert parsed.max_tokens is None
    assert (parsed.is_streaming, parsed.include_usage, parsed.priority) == (False, False, None)
    assert (parsed.sampling.temperature, parsed.sampling.top_p, parsed.sampling.n) == (1.0, 1.0, 1)
    assert parsed.sampling.logprobs is None


SAMPLING_DEFAULTS = {
    "n": 1,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "min_tokens": 0,
    "ignore_eos": False,
    "thinking_token_budget": -1,
    "prompt_logprobs": None,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
}


@given(st.sets(st.sampled_from(sorted(SAMPLING_DEFAULTS))), st.none() | st.floats(0.0, 2.0))
def test_a_body_that_spells_defaults_out_is_sampled_as_one_that_does_not(named, temperature):
    spelt = {name: SAMPLING_DEFAULTS[name] for name in named}
    expected = Sampling(max_tokens=0, temperature=1.0 if temperature is None else temperature)
    assert parse(temperature=temperature, **spelt).sampling == expected


def test_no_sampling_parameter_is_passed_over():
    read = set(re.findall(r"\bbody\.(\w+)", inspect.getsource(sampling.parse_sampling)))
    assert read - {"temperature", "stream"} == set(sampling._CHOICES) == set(SAMPLING_DEFAULTS)


def test_every_sampling_parameter_arrives():
    parsed = parse(
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.1,
        seed=-3,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        min_tokens=3,
        logprobs=True,
        top_logprobs=5,
        n=2,
        logit_bias={"17": -100},
    )
    sampling = parsed.sampling
    assert parsed.max_tokens == 7
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-2.0, 2.0, 1.1)
    assert (sampling.seed, sampling.stop, sampling.stop_token_ids) == (-3, ["a", "b"], [1, 2])
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.logprobs, sampling.n) == (True, 3, 5, 2)
    assert sampling.logit_bias == {17: -100.0}


def test_null_means_the_same_as_leaving_a_field_out():
    optional = [name for name in ChatBody.__struct_fields__ if name not in ("model", "messages")]
    nulled, plain = parse(**dict.fromkeys(optional)), parse()
    assert (nulled.sampling, nulled.max_tokens, nulled.messages) == (plain.sampling, plain.max_tokens, plain.messages)


def test_streaming_options_and_extensions_arrive():
    parsed = parse(
        stream=True,
        stream_options={"include_usage": True},
        cache_salt="s",
        priority=3,
        user="u",
        slo_ttft_ms=250,
        slo_itl_ms=40,
        timeout_ms=5000,
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
    )
    assert (parsed.is_streaming, parsed.include_usage) == (True, True)
    assert (parsed.cache_salt, parsed.priority, parsed.user) == ("s", 3, "u")
    assert (parsed.slo_ttft_s, parsed.slo_itl_s, parsed.timeout_s) == (0.25, 0.04, 5.0)
    assert parsed.template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}


def test_every_extension_arrives():
    parsed = parse(
        bad_words=["no"],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        thinking_token_budget=9,
        prompt_logprobs=2,
        return_token_ids=True,
        truncate_prompt_tokens=-1,
        documents=[{"title": "t", "text": "x"}],
        add_generation_prompt=False,
        prompt_cache_options={"mode": "explicit", "ttl": "30m", "prewarm": True},
    )
    sampling = parsed.sampling
    assert (sampling.is_stop_included, sampling.is_special_skipped) == (True, False)
    assert (sampling.thinking_tokens, sampling.prompt_logprobs) == (9, 2)
    assert (parsed.bad_words, parsed.has_token_ids, parsed.truncate_prompt_tokens) == (("no",), True, -1)
    assert parsed.documents == ({"title": "t", "text": "x"},)
    assert (parsed.is_reply, parsed.is_continued, parsed.is_prewarm) == (False, False, True)


def test_a_plain_chat_asks_for_none_of_them():
    parsed = parse()
    assert parsed.sampling == Sampling(max_tokens=0)
    assert (parsed.tools, parsed.parsing, parsed.documents, parsed.bad_words) == ((), None, (), ())
    assert (parsed.is_reply, parsed.is_continued, parsed.is_prewarm, parsed.truncate_prompt_tokens) == (
        True,
        False,
        False,
        None,
    )


def test_a_thinking_budget_of_minus_one_is_none():
    assert parse(thinking_token_budget=-1).sampling.thinking_tokens is None


@pytest.mark.parametrize(("effort", "is_thinking"), [("none", False), ("minimal", True), ("max", True)])
def test_an_effort_of_none_switches_thinking_off(effort, is_thinking):
    assert parse(reasoning_effort=effort).template_kwargs == {
        "reasoning_effort": effort,
        "enable_thinking": is_thinking,
    }


def test_usage_all_along_needs_usage_at_the_end():
    def told(**options):
        parsed = parse(stream=True, stream_options=options)
        return parsed.include_usage, parsed.has_continuous_usage

    assert told(include_usage=True, continuous_usage_stats=True) == (True, True)
    assert told(continuous_usage_stats=True) == (False, False)


def test_an_answer_goes_on_with_the_last_message_in_place_of_a_new_turn():
    parsed = parse(continue_final_message=True)
    assert (parsed.is_continued, parsed.is_reply) == (True, False)
    assert refusal(continue_final_message=True, add_generation_prompt=True).param == "continue_final_message"


@pytest.mark.parametrize(
    ("tier", "priority", "told"),
    [
        ("auto", None, None),
        ("default", None, None),
        ("scale", None, None),
        ("flex", None, 10),
        ("fast", None, -10),
        ("flex", 3, 3),
    ],
)
def test_a_service_tier_is_a_class_unless_one_is_given(tier, priority, told):
    assert parse(service_tier=tier, priority=priority).priority == told


def test_tools_bind_the_answer_before_a_response_format_does():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["x"]}}}
    parsed = parse(
        tools=[tool], tool_choice={"type": "function", "function": {"name": "f"}}, response_format=JSON_OBJECT
    )
    assert json.loads(parsed.sampling.structured.json_schema) == {"type": "object", "required": ["x"]}
    assert (parsed.tools, parsed.parsing.tool_choice) == ((tool,), "function:f")


def test_the_log_probabilities_of_a_prompt_are_not_streamed():
    assert refusal(prompt_logprobs=1, stream=True).param == "prompt_logprobs"


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"parallel_tool_calls": True},
        {"safety_identifier": "x"},
        {"prompt_cache_key": "x"},
        {"prediction": {"type": "content", "content": "x"}},
        {"verbosity": "low"},
        {"allowed_token_ids": []},
        {"guided_json": None},
        {"tools": []},
        {"tool_choice": "auto"},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"skip_special_tokens": True},
        {"top_k": -1},
        {"stop": "x"},
        {"max_tokens": 5, "max_completion_tokens": 5},
    ],
)
def test_fields_without_an_effect_are_accepted(fields):
    assert isinstance(parse(**fields), ParsedRequest)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("moderation", {"model": "m"}),
        ("web_search_options", {}),
        ("kv_transfer_params", {"do_remote_prefill": True}),
        ("allowed_token_ids", [1]),
        ("chat_template", "{{ 1 }}"),
        ("use_beam_search", True),
        ("truncation_side", "right"),
        ("include_reasoning", False),
    ],
)
def test_an_unsupported_field_with_an_effect_is_refused_by_name(name, value):
    error = refusal(**{name: value})
    assert error.param == name
    assert error.code == "unsupported_parameter"
    assert f"'{name}' is not supported" in str(error)


def test_a_field_that_nobody_knows_is_left_out_and_named():
    options = {"include_usage": True, "include_mood": True}
    parsed = parse(temprature=1, temperature=0.5, stream=True, stream_options=options)
    assert parsed.ignored == ("temprature", "stream_options.include_mood")
    assert (parsed.sampling.temperature, parsed.include_usage) == (0.5, True)
    assert parse(temperature=0.5).ignored == ()


def test_what_is_wrong_beside_a_field_that_nobody_knows_is_refused():
    assert refusal(temprature=1, n="x").param == "n"
    assert refusal(temprature=1, n=0).param == "n"


def test_a_misspelt_field_is_refused_with_the_nearest_name_where_fields_are_strict():
    body = json.dumps({"model": "m", "messages": [USER], "temprature": 1}).encode()
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(body, Limits(has_strict_fields=True))
    error = caught.value
    assert str(error) == "Unrecognized request argument supplied: temprature. Did you mean 'temperature'?"
    assert (error.param, error.code) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", 2.1, "2.1 is out of range; it must be from 0 to 2"),
        ("temperature", -0.1, "-0.1 is out of range"),
        ("top_p", -0.1, "-0.1 is out of range; it must be from 0 to 1"),
        ("top_p", 1.01, "out of range"),
        ("presence_penalty", -2.5, "from -2 to 2"),
        ("frequency_penalty", 3, "from -2 to 2"),
        ("repetition_penalty", 0, "it must be more than 0"),
        ("min_p", 1.5, "from 0 to 1"),
        ("top_k", -2, "-2 is out of range"),
        ("n", 0, "from 1 to 128"),
        ("n", 129, "129 is out of range"),
        ("service_tier", "best", '"best" is not one of auto, default'),
        ("reasoning_effort", "much", '"much" is not one of none, minimal'),
        ("thinking_token_budget", -2, "-2 is out of range"),
        ("prompt_logprobs", 21, "from 0 to 20"),
        ("truncate_prompt_tokens", 0, "at least 1"),
        ("bad_words", [" "], "must not be empty"),
        ("bad_words", ["x"] * 129, "129 bad words were given and the limit is 128"),
        ("documents", [{}] * 1025, "the limit is 1024"),
        ("max_tokens", 0, "0 is out of range; it must be at least 1"),
        ("max_completion_tokens", -1, "at least 1"),
        ("min_tokens", -1, "-1 is out of range"),
        ("seed", 2**64, "out of range"),
        ("priority", 5000, "from -1000 to 1000"),
        ("slo_ttft_ms", 0, "from 0.001 to 8.64e+07"),
        ("slo_itl_ms", 1e-300, "from 0.001 to 8.64e+07"),
        ("slo_itl_ms", 1e8, "from 0.001 to 8.64e+07"),
        ("stop", [""], "must not be empty"),
        ("stop", ["x"] * 17, "17 stop strings were given and the limit is 16"),
        ("stop", "x" * 1025, "the limit is 1024"),
        ("stop_token_ids", [-1], "-1 is out of range"),
        ("stop_token_ids", [1] * 129, "the limit is 128"),
        ("logit_bias", {"x": 1}, 'the key "x" is not a token id'),
        ("logit_bias", {"1": 1.5e2}, "from -100 to 100"),
        ("cache_salt", "x" * 257, "the limit is 256"),
        ("top_logprobs", 21, "from 0 to 20"),
        ("top_logprobs", 2, "needs 'logprobs': true"),
        ("stream_options", {"include_usage": True}, "only together with 'stream'"),
        ("chat_template_kwargs", [], "it must be an object; the value is []"),
        ("chat_template_kwargs", {"x": "y" * 70_000}, "the limit is 65536"),
        ("chat_template_kwargs", {"messages": []}, "no name that a template may be given"),
        ("chat_template_kwargs", {"bos_token": "x"}, "no name that a template may be given"),
    ],
)
def test_a_value_out_of_range_is_refused_with_value_and_limit(name, value, said):
    error = refusal(**{name: value})
    assert error.param is not None
    assert error.param.startswith(name)
    assert said in str(error)


def test_several_greedy_choices_are_drawn_from_the_likeliest_token_alone():
    sampling = parse(n=2, temperature=0, top_p=0.3, top_k=7).sampling
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.top_k) == (2, 1.0, 1.0, 1)
    alone = parse(n=1, temperature=0, top_k=7).sampling
    assert (alone.temperature, alone.top_k) == (0.0, 7)


def test_two_different_max_tokens_are_refused():
    assert "differ" in str(refusal(max_tokens=1, max_completion_tokens=2))


def test_min_tokens_beyond_max_tokens_is_refused():
    assert "from 0 to 4" in str(refusal(max_tokens=4, min_tokens=5))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", "5", 'expected int | null, got str; the value is "5"'),
        ("max_tokens", 5.0, "got float"),
        ("max_tokens", True, "got bool"),
        ("messages", "hi", 'expected array, got str; the value is "hi"'),
        ("logit_bias", {"1": "x"}, "expected float, got str"),
        ("stop", [1], "expected str, got int"),
        ("stream", "yes", "expected bool | null, got str"),
    ],
)
def test_a_wrong_type_is_refused_with_field_type_and_value(name, value, said):
    error = refusal(**{name: value})
    assert error.code == "invalid_type"
    assert said in str(error)


def test_no_messages_are_refused():
    assert "at least one" in str(refusal(messages=[]))


def test_too_many_messages_are_refused_with_the_limit():
    with pytest.raises(InvalidRequest, match="3 messages were given and the limit is 2"):
        parse_chat(json.dumps({"model": "m", "messages": [USER] * 3}).encode(), Limits(num_messages=2))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(name=st.sampled_from(ChatBody.__struct_fields__), value=json_values)
def test_any_value_in_any_field_is_parsed_or_refused(name, value):
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse(**{name: value}), ParsedRequest)


MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "refusal", "audio")
message_values = st.fixed_dictionaries({}, optional=dict.fromkeys(MESSAGE_FIELDS, json_values))


@given(message=message_values | json_values, role=st.sampled_from(["user", "assistant", 3]))
def test_any_message_is_parsed_or_refused(message, role):
    messages = [{"role": role, **message}] if isinstance(message, dict) else [message]
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse(messages=messages), ParsedRequest)


def test_no_probability_mass_is_the_likeliest_token():
    sampling = parse(top_p=0, top_k=50).sampling
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)
