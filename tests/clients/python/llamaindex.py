"""LlamaIndex: its models that are like OpenAI's."""

import json
import os
import sys
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses

url, api, how, told, *questions = sys.argv[1:]
calls: list[Any] = []


def weather(at: str) -> str:
    """The weather at a place."""
    calls.append({"at": at})
    return told


tool = FunctionTool.from_defaults(weather)
common: Any = {"model": "sim", "api_base": f"{url}/v1", "api_key": "any", "max_retries": 0}
common["default_headers"] = json.loads(os.environ["HEADRACE_HEADERS"])
common["is_function_calling_model"] = True
if api == "chat":
    streaming = {"stream_options": {"include_usage": True}} if how == "streamed" else {}
    model = OpenAILike(is_chat_model=True, additional_kwargs=streaming, **common)
else:
    model = OpenAILikeResponses(**common)


def tokens(raw: Any) -> list[int]:
    """Of the prompt and the answer.  raw: the answer, or the last event of its stream, in OpenAI's own types."""
    if api == "chat":
        return [raw.usage.prompt_tokens, raw.usage.completion_tokens]
    used = (raw if how == "whole" else raw.response).usage
    return [used.input_tokens, used.output_tokens]


turns: list[Any] = []
texts, usage = [], []
for question in questions:
    turns.append(ChatMessage(role="user", content=question))
    while True:
        if how == "whole":
            answer = model.chat_with_tools([tool], chat_history=turns, allow_parallel_tool_calls=True)
            texts.append(answer.message.content or "")
        else:
            streamed = model.stream_chat_with_tools([tool], chat_history=turns, allow_parallel_tool_calls=True)
            chunks = list(streamed)
            texts.append("".join(chunk.delta or "" for chunk in chunks))
            answer = chunks[-1]
        turns.append(answer.message)
        usage.append(tokens(answer.raw))
        wanted = model.get_tool_calls_from_response(answer, error_on_no_tool_call=False)
        if not wanted:
            break
        for call in wanted:
            content, answered = tool(**call.tool_kwargs).content, {"tool_call_id": call.tool_id}
            turns.append(ChatMessage(role="tool", content=content, additional_kwargs=answered))
print(json.dumps({"calls": calls, "texts": texts, "usage": usage}))
