"""pydantic-ai: its agent calls the tools and asks again."""

import asyncio
import json
import os
import sys
from typing import Any

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic_ai import Agent, PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

url, api, how, told, *questions = sys.argv[1:]
calls: list[Any] = []
streamed: list[str] = []


async def weather(at: str) -> str:
    """The weather at a place."""
    calls.append({"at": at})
    return told


def model() -> Any:
    common: Any = {"api_key": "any", "max_retries": 0}
    common["default_headers"] = json.loads(os.environ["HEADRACE_HEADERS"])
    if api == "messages":
        return AnthropicModel(
            "sim", provider=AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=url, **common))
        )
    kind = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[api]
    return kind("sim", provider=OpenAIProvider(openai_client=AsyncOpenAI(base_url=f"{url}/v1", **common)))


async def collect(_context: Any, events: Any) -> None:
    """What comes in pieces, of one of the model's turns; its handler is also called for each turn of the tools."""
    pieces: list[str] = []
    async for event in events:
        if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
            pieces.append(event.part.content)
        elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
            pieces.append(event.delta.content_delta)
    if pieces:
        streamed.append("".join(pieces))


async def main() -> None:
    agent = Agent(model(), tools=[weather])
    history, texts, usage = [], [], []
    for question in questions:
        handler = collect if how == "streamed" else None
        result = await agent.run(question, message_history=history, event_stream_handler=handler)
        history = result.all_messages()
        turns = [message for message in result.new_messages() if isinstance(message, ModelResponse)]
        texts += ["".join(part.content for part in turn.parts if isinstance(part, TextPart)) for turn in turns]
        usage += [[turn.usage.input_tokens, turn.usage.output_tokens] for turn in turns]
    if how == "streamed":
        texts = streamed
    print(json.dumps({"calls": calls, "texts": texts, "usage": usage}))


asyncio.run(main())
