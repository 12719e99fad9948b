"""LangChain's models for OpenAI and Anthropic, with tools bound to them."""

import json
import os
import sys
from functools import reduce
from operator import add
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url, api, how, told, *questions = sys.argv[1:]
calls: list[Any] = []


@tool
def weather(at: str) -> str:
    """The weather at a place."""
    calls.append({"at": at})
    return told


common: Any = {"model": "sim", "api_key": "any", "max_retries": 0}
common["default_headers"] = json.loads(os.environ["HEADRACE_HEADERS"])
model = {
    "chat": lambda: ChatOpenAI(base_url=f"{url}/v1", stream_usage=True, **common),
    "responses": lambda: ChatOpenAI(base_url=f"{url}/v1", use_responses_api=True, **common),
    "responses by id": lambda: ChatOpenAI(base_url=f"{url}/v1", use_previous_response_id=True, **common),
    "messages": lambda: ChatAnthropic(base_url=url, max_tokens=2000, **common),
}[api]().bind_tools([weather])

turns: list[Any] = []
texts, usage = [], []
for question in questions:
    turns.append(HumanMessage(question))
    while True:
        if how == "whole":
            answer = model.invoke(turns)
            texts.append(answer.text)
        else:
            chunks = list(model.stream(turns))
            texts.append("".join(chunk.text for chunk in chunks))
            answer = reduce(add, chunks)
        turns.append(answer)
        usage.append([answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]])
        if not answer.tool_calls:
            break
        turns += [weather.invoke(call) for call in answer.tool_calls]
print(json.dumps({"calls": calls, "texts": texts, "usage": usage}))
