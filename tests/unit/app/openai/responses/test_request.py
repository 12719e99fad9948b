from pathlib import Path

import msgspec
import pytest
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from app.openai.responses.bodies import ResponseBody
from app.openai.responses.request import parse_response
from app.openai.schema import Limits
from planes.wire.errors import InvalidRequest
from tests.openai_types import checked_response

RECORDED = Path(__file__).parents[4] / "integration" / "recorded"
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": False}


def asked(**fields):
    return parse_response(msgspec.json.encode({"model": "m", "input": "Hi"} | fields))


def parsed(**fields):
    return asked(**fields).parsed


def repeated(**fields):
    found = asked(**fields)
    return msgspec.json.decode(found.completed([], {}, is_stored=True, num_bytes=0).repeated)


def refused(**fields):
    with pytest.raises(InvalidRequest) as error:
        asked(**fields)
    return error.value


def test_every_field_of_openais_newest_type_is_known():
    unknown = {*ResponseCreateParamsBase.__annotations__, "stream"} - {*ResponseBody.__struct_fields__}
    assert not unknown


def test_every_field_that_an_answer_repeats_is_of_openais_type():
    told = repeated(
        tools=[FUNCTION, {"type": "custom", "name": "c"}],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        text={"format": {"type": "json_schema", "name": "s", "schema": {"type": "object"}}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        metadata={"a": "b"},
        service_tier="fast",
        instructions="Be brief.",
    )
    whole = {"id": "resp_1", "object": "response", "created_at": 7.0, "model": "m", "output": [], "status": "completed"}
    checked_response(whole | told)
    assert {"store"} | set(Response.model_fields) >= told.keys()
    assert (told["service_tier"], told["store"], told["temperature"]) == ("priority", True, 1.0)


def test_sampling_is_named_as_in_responses():
    found = parsed(max_output_tokens=5, temperature=0.5, top_p=0.9, seed=1, ignore_eos=True)
    assert (found.max_tokens, found.sampling.temperature, found.sampling.seed) == (5, 0.5, 1)
    assert refused(max_tokens=5).param == "max_tokens"
    assert refused(n=2).param == "n"
    assert refused(max_output_tokens=0).param == "max_output_tokens"


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"top_logprobs": 3}, 3),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"top_logprobs": 0}, None),
    ],
)
def test_log_probabilities_are_asked_for_in_two_ways(fields, logprobs):
    assert parsed(**fields).sampling.logprobs == logprobs


def test_tools_are_flat_and_those_that_nobody_serves_are_left_out_and_named():
    found = parsed(tools=[FUNCTION, {"type": "web_search"}, {"type": "namespace", "name": "n", "tools": []}])
    assert [tool["function"]["name"] for tool in found.tools] == ["f"]
    assert found.ignored == ("tools[1] (web_search)", "tools[2] (namespace)")
    assert [tool["name"] for tool in repeated(tools=[FUNCTION, {"type": "local_shell"}])["tools"]] == ["f"]


def test_only_unserved_tools_are_no_tools():
    found = parsed(tools=[{"type": "web_search"}], tool_choice="auto")
    assert (found.tools, found.parsing) == ((), None)


def test_a_custom_tool_is_shown_as_a_function_and_called_as_what_it_is():
    found = parsed(tools=[{"type": "custom", "name": "c", "description": "d"}])
    assert found.parsing.custom == ["c"]
    assert found.tools[0]["function"]["parameters"]["required"] == ["input"]


@pytest.mark.parametrize(
    "choice",
    [
        "sometimes",
        {"type": "file_search"},
        {"type": "function"},
        {"type": "function", "name": "g"},
        {"type": "allowed_tools", "mode": "never", "tools": []},
    ],
)
def test_a_choice_of_no_tool_is_refused(choice):
    assert refused(tools=[FUNCTION], tool_choice=choice).param == "tool_choice"


def test_a_named_tool_binds_the_answer_to_its_arguments():
    found = parsed(tools=[FUNCTION], tool_choice={"type": "function", "name": "f"})
    assert msgspec.json.decode(found.sampling.structured.json_schema) == FUNCTION["parameters"]


def test_the_text_may_be_bound_to_a_schema():
    wanted = {"type": "json_schema", "name": "s", "schema": {"type": "object"}, "strict": True}
    assert parsed(text={"format": wanted}).sampling.structured.json_schema == '{"type":"object"}'
    assert parsed(text={"format": {"type": "json_object"}}).sampling.structured is not None
    assert parsed(text={"format": {"type": "text"}}).sampling.structured is None
    assert refused(text={"format": {"type": "json_schema", "name": "s"}}).param == "text.format.schema"
    assert refused(text={"format": {"type": "xml"}}).param == "text.format.type"


def test_efforts_reach_the_template():
    kwargs = {"reasoning_effort": "none", "enable_thinking": False}
    assert parsed(reasoning={"effort": "none"}).template_kwargs == kwargs
    assert refused(reasoning={"effort": "some"}).param == "reasoning.effort"


@pytest.mark.parametrize("name", ["conversation", "prompt", "context_management", "moderation", "response_format"])
def test_what_is_not_offered_is_refused_by_name(name):
    assert (refused(**{name: {"id": "x"}}).param, refused(**{name: {"id": "x"}}).code) == (
        name,
        "unsupported_parameter",
    )


def test_unknown_fields_are_named_or_refused():
    assert parsed(client_metadata={"a": 1}, reasoning={"effort": "low", "depth": 2}).ignored == (
        "client_metadata",
        "reasoning.depth",
    )
    body = msgspec.json.encode({"model": "m", "input": "Hi", "client_metadata": {}})
    with pytest.raises(InvalidRequest, match="client_metadata"):
        parse_response(body, Limits(has_strict_fields=True))


def test_background_needs_the_store():
    assert asked(background=True).is_background
    assert refused(background=True, store=False).param == "background"


def test_nothing_to_answer_is_refused():
    found = parse_response(b'{"model": "m"}')
    with pytest.raises(InvalidRequest, match="'input'"):
        found.completed([], {}, is_stored=False, num_bytes=0)


@pytest.mark.parametrize("metadata", [{str(i): "" for i in range(17)}, {"k" * 65: ""}, {"k": "v" * 513}])
def test_metadata_has_openais_limits(metadata):
    assert refused(metadata=metadata).param.startswith("metadata")


def test_what_codex_sends_is_read_whole():
    found = parse_response((RECORDED / "codex.json").read_bytes())
    assert found.parsed.ignored == ("client_metadata", "tools[8] (tool_search)", "tools[9] (web_search)")
    assert found.parsed.parsing.custom == ["apply_patch"]
    messages = found.completed([], {}, is_stored=False, num_bytes=0).messages
    roles = ["system", "user", "user", "assistant", "tool", "tool", "assistant", "tool"]
    assert [message["role"] for message in messages] == roles
    assert [message["reasoning_content"] for message in messages if message["role"] == "assistant"] == [
        "I must look at the wheel.",
        "I turn it.",
    ]
    called = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    assert [call["arguments"] for call in called[:2]] == [{"cmd": "cat wheel.py"}, {"cmd": "echo mill"}]
    assert called[2]["name"] == "apply_patch"
    assert called[2]["arguments"]["input"].startswith("*** Begin Patch\n")


def test_what_an_older_coding_agent_sends_is_read_whole():
    found = parse_response((RECORDED / "coding_agent.json").read_bytes())
    assert found.parsed.ignored == (
        "client_metadata",
        "input[9] (web_search_call)",
        "input[10] (local_shell_call)",
        "tools[2] (namespace)",
        "tools[3] (web_search)",
        "tools[4] (local_shell)",
    )
    messages = found.completed([], {}, is_stored=False, num_bytes=0).messages
    roles = ["system", "user", "user", "assistant", "tool", "assistant", "tool", "user"]
    assert [message["role"] for message in messages] == roles
    assert messages[3]["reasoning_content"] == "**Looking for the wheel**"
    assert messages[3]["content"] == "I look at the wheel first."


def test_what_the_answer_shall_keep_arrives_in_seconds():
    found = parsed(slo_ttft_ms=250, slo_itl_ms=40)
    assert (found.slo_ttft_s, found.slo_itl_s) == (0.25, 0.04)
    assert refused(slo_itl_ms=0).param == "slo_itl_ms"
