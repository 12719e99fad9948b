import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.openai.chat import parse_chat
from app.openai.schema import ChatBody, Kind, Limits, ParsedRequest
from planes.wire.errors import InvalidRequest

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
        timeout_ms=5000,
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
    )
    assert (parsed.is_streaming, parsed.include_usage) == (True, True)
    assert (parsed.cache_salt, parsed.priority, parsed.user) == ("s", 3, "u")
    assert (parsed.slo_ttft_s, parsed.timeout_s) == (0.25, 5.0)
    assert parsed.template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"parallel_tool_calls": True},
        {"safety_identifier": "x"},
        {"prompt_cache_key": "x"},
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
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("kv_transfer_params", {"do_remote_prefill": True}),
        ("guided_json", {}),
        ("chat_template", "{{ 1 }}"),
        ("use_beam_search", True),
        ("continue_final_message", True),
    ],
)
def test_an_unsupported_field_with_an_effect_is_refused_by_name(name, value):
    error = refusal(**{name: value})
    assert error.param == name
    assert error.code == "unsupported_parameter"
    assert f"'{name}' is not supported" in str(error)


def test_a_misspelt_field_is_refused_with_the_nearest_name():
    error = refusal(temprature=1)
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
        ("n", 0, "from 1 to 16"),
        ("n", 17, "17 is out of range"),
        ("max_tokens", 0, "0 is out of range; it must be at least 1"),
        ("max_completion_tokens", -1, "at least 1"),
        ("min_tokens", -1, "-1 is out of range"),
        ("seed", 2**64, "out of range"),
        ("priority", 5000, "from -1000 to 1000"),
        ("slo_ttft_ms", 0, "more than 0"),
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


def test_several_greedy_choices_are_refused_because_they_would_be_the_same():
    assert refusal(n=2, temperature=0).param == "n"


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


def test_text_parts_are_joined_by_newlines():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(messages=[{"role": "user", "content": content}]).messages[0]["content"] == "a\nb"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "alien", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": "x", "audio": {"id": "1"}}, "messages[0].audio"),
        ({"role": "user", "content": "x", "nme": "y"}, "messages[0].nme"),
        ({"content": "x"}, "messages[0].role"),
    ],
)
def test_a_bad_message_is_refused_with_its_place(message, param):
    assert refusal(messages=[message]).param == param


def test_no_messages_are_refused():
    assert "at least one" in str(refusal(messages=[]))


def test_too_many_messages_are_refused_with_the_limit():
    with pytest.raises(InvalidRequest, match="3 messages were given and the limit is 2"):
        parse_chat(json.dumps({"model": "m", "messages": [USER] * 3}).encode(), Limits(num_messages=2))


def test_an_answer_sent_back_as_history_is_accepted():
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    }
    tool = {"role": "tool", "tool_call_id": "1", "content": "42"}
    parsed = parse(messages=[USER, answer, tool])
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert parsed.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert parsed.messages[2] == {"role": "tool", "content": "42", "tool_call_id": "1"}


def test_tool_arguments_that_are_no_json_are_refused():
    call = {"id": "1", "function": {"name": "f", "arguments": "{"}}
    assert "not valid JSON" in str(refusal(messages=[{"role": "assistant", "tool_calls": [call]}]))


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
