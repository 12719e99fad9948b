"""Tools, thoughts and schemas in responses, with answers that the simulated engine is told to give."""

import json
from pathlib import Path

import httpx
import openai
import pydantic
import pytest

from tests.openai_types import checked_event, sse

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RECORDED = Path(__file__).parent / "recorded"
WIDTH = {
    "type": "function",
    "name": "width",
    "description": "How wide something is.",
    "parameters": {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]},
    "strict": False,
}
SHELL = {"type": "custom", "name": "shell", "description": "Runs a command."}
CALL = '<tool_call>\n{"name": "width", "arguments": {"of": "mill"}}\n</tool_call>'
SCRIPT = {"x-headrace-script": json.dumps([CALL, "It is 12 metres wide."])}


@pytest.fixture
async def client(stack):
    async with openai.AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def test_a_tool_is_called_and_its_answer_goes_on_by_id(client):
    first = await client.responses.create(model="sim", input="How wide?", tools=[WIDTH], extra_headers=SCRIPT)
    (call,) = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "width", {"of": "mill"})
    second = await client.responses.create(
        model="sim",
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "12"}],
        previous_response_id=first.id,
        tools=[WIDTH],
        extra_headers=SCRIPT,
    )
    assert second.output_text == "It is 12 metres wide."


async def test_the_same_streamed_with_the_history_sent_again(client):
    history = [{"role": "user", "content": "How wide?"}]
    said = []
    for _ in range(2):
        async with client.responses.stream(
            model="sim", input=history, tools=[WIDTH], store=False, extra_headers=SCRIPT
        ) as stream:
            told = [event async for event in stream]
            final = await stream.get_final_response()
        kinds = [event.type for event in told]
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        history += final.output
        for item in final.output:
            if item.type == "function_call":
                arguments = [e.delta for e in told if e.type == "response.function_call_arguments.delta"]
                assert "".join(arguments) == item.arguments
                history.append({"type": "function_call_output", "call_id": item.call_id, "output": "12"})
        said.append(final.output_text)
    assert said == ["", "It is 12 metres wide."]


async def test_thoughts_are_an_item_of_their_own(site):
    await site.worker("both-1", "--reasoning-parser", "think")
    gateway = await site.gateway(num_workers=1)
    script = {"x-headrace-script": json.dumps(["<think>I must measure.</think>It is wide."])}
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        response = await client.responses.create(model="sim", input="How wide?", extra_headers=script)
    reasoning, message = response.output
    assert reasoning.content[0].text == "I must measure."
    assert (message.type, response.output_text) == ("message", "It is wide.")
    assert response.usage.output_tokens_details.reasoning_tokens > 0


async def test_a_custom_tool_gets_its_text(client):
    call = '<tool_call>{"name": "shell", "arguments": {"input": "echo \\"hi\\"\\n"}}</tool_call>'
    script = {"x-headrace-script": json.dumps([call])}
    response = await client.responses.create(model="sim", input="Say hi.", tools=[SHELL], extra_headers=script)
    (item,) = response.output
    assert (item.type, item.name, item.input) == ("custom_tool_call", "shell", 'echo "hi"\n')


class Mill(pydantic.BaseModel):
    """What the answer must be."""

    name: str
    width: int


async def test_a_schema_is_parsed_into_its_type(client):
    response = await client.responses.parse(model="sim", input="Which mill?", text_format=Mill)
    assert isinstance(response.output_parsed, Mill)


async def test_a_tool_that_must_be_called_is(client):
    response = await client.responses.create(model="sim", input="How wide?", tools=[WIDTH], tool_choice="required")
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "width")
    assert isinstance(json.loads(call.arguments)["of"], str)


@pytest.mark.parametrize("name", ["coding_agent.json", "codex.json"])
async def test_a_recorded_request_of_a_coding_agent_gets_its_call(client, name):
    recorded = json.loads((RECORDED / name).read_text())
    patch = '<tool_call>{"name": "apply_patch", "arguments": {"input": "*** Begin Patch\\n*** End Patch"}}</tool_call>'
    script = {"x-headrace-script": json.dumps([patch] * 4)}
    response = await client.post("/responses", body=recorded, options={"headers": script}, cast_to=httpx.Response)
    told = sse(response.content)
    for event in told:
        checked_event(event)
    assert told[-1]["response"]["output"][-1]["input"] == "*** Begin Patch\n*** End Patch"
