"""LiteLLM: OpenAI's and Anthropic's APIs behind one function."""

import json
import os
import sys
from typing import Any

import litellm

url, api, how, told, *questions = sys.argv[1:]
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "…", "parameters": PARAMETERS}}]
asked: dict[str, Any] = {"tools": TOOLS, "api_key": "any", "max_tokens": 2000, "num_retries": 0}
asked["extra_headers"] = json.loads(os.environ["HEADRACE_HEADERS"])
asked |= {
    "chat": {"model": "openai/sim", "api_base": f"{url}/v1"},
    "responses": {"model": "openai/responses/sim", "api_base": f"{url}/v1"},
    "messages": {"model": "anthropic/sim", "api_base": url},
}[api]

calls, texts, usage = [], [], []
turns: list[Any] = []
for question in questions:
    turns.append({"role": "user", "content": question})
    while True:
        if how == "whole":
            answer = litellm.completion(messages=turns, **asked)
            texts.append(answer.choices[0].message.content or "")
        else:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(litellm.completion(messages=turns, **asked, **options))
            texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
            answer = litellm.stream_chunk_builder(chunks, messages=turns)
        message = answer.choices[0].message
        turns.append(message.model_dump())
        usage.append([answer.usage.prompt_tokens, answer.usage.completion_tokens])
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            calls.append(json.loads(call.function.arguments))
            turns.append({"role": "tool", "tool_call_id": call.id, "content": told})
print(json.dumps({"calls": calls, "texts": texts, "usage": usage}))
