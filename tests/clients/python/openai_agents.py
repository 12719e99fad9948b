"""openai-agents: its loop calls the tools and asks again."""

import asyncio
import json
import os
import sys
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

url, api, how, told, *questions = sys.argv[1:]
calls: list[Any] = []


@function_tool
def weather(at: str) -> str:
    """The weather at a place."""
    calls.append({"at": at})
    return told


async def run(agent: Any, asked: list[Any], **options: Any) -> tuple[Any, list[str]]:
    """How it went, and what the model said in each of its turns."""
    if how == "whole":
        result = await Runner.run(agent, asked, **options)
        said = [[item for item in turn.output if item.type == "message"] for turn in result.raw_responses]
        return result, ["".join(part.text for item in items for part in item.content) for items in said]
    result = Runner.run_streamed(agent, asked, **options)
    texts = [""]
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            texts[-1] += event.data.delta
        elif event.type == "raw_response_event" and event.data.type == "response.completed":
            texts.append("")
    return result, texts[:-1]


async def main() -> None:
    headers = json.loads(os.environ["HEADRACE_HEADERS"])
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="any", default_headers=headers, max_retries=0)
    model = OpenAIChatCompletionsModel("sim", client) if api == "chat" else OpenAIResponsesModel("sim", client)
    settings = ModelSettings(include_usage=True)
    agent = Agent(name="a", instructions="Be brief.", model=model, model_settings=settings, tools=[weather])
    history: list[Any] = []
    options: dict[str, Any] = {"auto_previous_response_id": api == "responses by id"}
    texts, usage = [], []
    for question in questions:
        result, said = await run(agent, [*history, {"role": "user", "content": question}], **options)
        if api == "responses by id":
            options["previous_response_id"] = result.last_response_id
        else:
            history = result.to_input_list()
        texts += said
        usage += [[turn.usage.input_tokens, turn.usage.output_tokens] for turn in result.raw_responses]
    print(json.dumps({"calls": calls, "texts": texts, "usage": usage}))


set_tracing_disabled(disabled=True)
asyncio.run(main())
