"""What a newcomer does: `headrace up`, the printed curl, a look at what it says of itself. Real model, real parts."""

import asyncio
import json
import re
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.e2e.stack import MOST_JSON_TOKENS, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

LONG = " ".join(
    f"Note {i}: gate {i * 7 % 13} of the weir lets {i * i % 17} buckets of water a minute to the wheel."
    for i in range(30)
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory, demo_model):
    running = Stack(tmp_path_factory.mktemp("up"))
    try:
        yield running.wait_until_ready()
    finally:
        if running.process.poll() is None:
            running.stop()


@pytest.fixture(scope="module")
def client(stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=600) as client:
        yield client


def test_the_printed_curl_streams_tokens_from_two_workers(stack):
    command = stack.said().rpartition("listens on")[2].partition("\n\n")[2].partition("\n\n")[0]
    answer = subprocess.run(
        ["sh", "-c", command.replace("curl ", "curl -s -i ", 1)], capture_output=True, text=True, check=True
    )
    head, _, body = answer.stdout.partition("\n\n")
    headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    assert (headers["x-headrace-prefill"], headers["x-headrace-decode"]) == ("prefill-1", "decode-1")
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    words = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert words == "The capital of France is Paris."
    assert body.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("content", ["The capital of France is", LONG])
def test_a_handed_over_answer_is_what_one_engine_gives_alone(stack, content):
    before = stack.metric("headrace_handover_bytes_total")
    together = stack.chat(content, handover="always", salt=f"together-{len(content)}", max_tokens=24)
    assert together.headers["x-headrace-prefill"] != together.headers["x-headrace-decode"]
    assert stack.metric("headrace_handover_bytes_total") > before
    alone = stack.chat(content, handover="never", salt=f"alone-{len(content)}", max_tokens=24)
    assert alone.headers["x-headrace-prefill"] == alone.headers["x-headrace-decode"]
    assert alone.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert stack.tokens(together) == stack.tokens(alone)


def test_the_second_time_the_shared_blocks_are_cached(stack):
    first = stack.chat(LONG, handover="always", salt="twice").json()["usage"]
    second = stack.chat(LONG, handover="auto", salt="twice").json()["usage"]
    block_size = httpx.get(f"{stack.url}/v1/fleet", timeout=600).json()["workers"][0]["facts"]["block_size"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    shared = (first["prompt_tokens"] - 1) // block_size * block_size
    assert second["prompt_tokens_details"]["cached_tokens"] == shared


def test_openai_s_client_works_unchanged(client):
    messages = [{"role": "user", "content": "Count: one, two, three,"}]
    whole = client.chat.completions.create(model="smollm2-135m", messages=messages, max_tokens=8, temperature=0)
    stream = client.chat.completions.create(
        model="smollm2-135m",
        messages=messages,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    completion = client.completions.create(model="smollm2-135m", prompt="The capital of France is", max_tokens=4)
    assert completion.choices[0].text
    assert [model.id for model in client.models.list()] == ["smollm2-135m"]


def test_bad_input_never_reaches_the_engine(client, stack):
    served = stack.metric("headrace_prompt_tokens_total")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="smollm2-135m", prompt="word " * 5000, max_tokens=1)
    assert "2048" in str(too_long.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gemma-4", prompt="x")
    assert stack.metric("headrace_prompt_tokens_total") == served


def test_the_route_of_a_request_is_explained(stack):
    answer = stack.chat("Why did it go there?", handover="always", salt="explain")
    route = httpx.get(f"{stack.url}/v1/routes/{answer.headers['x-request-id']}", timeout=600).json()
    assert route["chosen"]["prefill"] == "prefill-1"
    assert route["observed"]["handover_bytes"] > 0


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "trade": {"enum": ["miller", "smith", "baker"]},
    },
    "required": ["name", "age", "trade"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 0, "maximum": 14},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
}


@pytest.fixture
async def handing_over(stack):
    headers = {"x-headrace-handover": "always"}
    async with openai.AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="none", timeout=600, max_retries=0, default_headers=headers
    ) as client:
        yield client


async def fifty(ask):
    """Twenty-five requests streamed and as many whole, eight at a time."""
    room = asyncio.Semaphore(8)

    async def one(number):
        async with room:
            return await ask(number)

    return await asyncio.gather(*map(one, range(50)))


async def test_a_json_schema_holds_fifty_times_of_fifty(handing_over):
    async def ask(number):
        asked = {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": f"Describe villager number {number} as JSON."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
            "temperature": 1.0 if number % 4 else 0.0,
            "seed": number,
            "max_tokens": MOST_JSON_TOKENS,
        }
        if number % 2:
            answer = await handing_over.chat.completions.create(**asked)
            return answer.choices[0].message.content
        stream = await handing_over.chat.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    for text in await fifty(ask):
        jsonschema.validate(json.loads(text), PERSON)


async def test_a_required_call_has_valid_arguments_fifty_times_of_fifty(handing_over):
    tool = {"type": "function", "function": {"name": "weather", "description": "A forecast.", "parameters": WEATHER}}

    async def ask(number):
        asked = {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": f"Will it rain in town number {number}?"}],
            "tools": [tool],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": 1.0 if number % 4 else 0.0,
            "seed": number,
            "max_tokens": MOST_JSON_TOKENS,
        }
        if number % 2:
            choice = (await handing_over.chat.completions.create(**asked)).choices[0]
        else:
            async with handing_over.chat.completions.stream(**asked) as stream:
                choice = (await stream.get_final_completion()).choices[0]
        (call,) = choice.message.tool_calls
        return choice.finish_reason, call.function.name, call.function.arguments

    for finish, name, arguments in await fifty(ask):
        assert (finish, name) == ("tool_calls", "weather")
        jsonschema.validate(json.loads(arguments), WEATHER)


def both_ways(stack, path, body):
    """What two workers answer to one request, and what one of them answers alone."""
    answers = []
    for handover in ("always", "never"):
        salt = f"{handover} {zlib.crc32(repr(body).encode())}"
        asked = {"model": "smollm2-135m", "temperature": 0, "cache_salt": salt} | body
        answer = stack.post(path, asked, handover=handover)
        assert answer.status_code == 200, answer.text
        workers = {answer.headers["x-headrace-prefill"], answer.headers["x-headrace-decode"]}
        assert len(workers) == (2 if handover == "always" else 1)
        answers.append(answer)
    return answers


def events_of(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


FREE: Any = {"type": "custom", "custom": {"name": "note", "description": "Writes a line down."}}
PLATE = "[A-Z]{2}-[0-9]{3}"
GRAMMAR: Any = {"type": "grammar", "grammar": {"syntax": "regex", "definition": PLATE}}
MATCHING: Any = {"type": "custom", "custom": {"name": "plate", "description": "Looks a car up.", "format": GRAMMAR}}


@pytest.mark.parametrize("tool", [FREE, MATCHING], ids=["text", "grammar"])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_custom_tool_is_given_the_same_text_by_two_workers_as_by_one(stack, tool, choice):
    name = tool["custom"]["name"]
    body = {
        "messages": [{"role": "user", "content": "Whose car is it? Call the tool."}],
        "tools": [tool],
        "tool_choice": "required" if choice == "required" else {"type": "custom", "custom": {"name": name}},
        "parallel_tool_calls": False,
        "max_tokens": 60,
    }
    inputs = []
    for answer in both_ways(stack, "/v1/chat/completions", body):
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        assert (call["type"], call["custom"]["name"]) == ("custom", name)
        inputs.append(call["custom"]["input"])
    for answer in both_ways(stack, "/v1/chat/completions", body | {"stream": True}):
        deltas = [choice["delta"] for event in events_of(answer) for choice in event["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
        assert calls[0]["custom"]["name"] == name
        inputs.append("".join(call["custom"].get("input") or "" for call in calls))
    flat: Any = {"type": "custom"} | tool["custom"]
    if "format" in flat:
        flat["format"] = {"type": "grammar"} | GRAMMAR["grammar"]
    wanted = "required" if choice == "required" else {"type": "custom", "name": name}
    response = {
        "input": body["messages"],
        "tools": [flat],
        "tool_choice": wanted,
        "parallel_tool_calls": False,
        "max_output_tokens": 60,
        "store": False,
    }
    for answer in both_ways(stack, "/v1/responses", response):
        (item,) = answer.json()["output"]
        assert (item["type"], item["name"]) == ("custom_tool_call", name)
        inputs.append(item["input"])
    assert len(set(inputs)) == 1
    assert inputs[0]
    if tool is MATCHING:
        assert re.fullmatch(PLATE, inputs[0])


def test_what_two_workers_say_of_their_tokens_one_says_of_them_as_a_prompt(stack):
    """Of an answer that is handed over, and of an echoed prompt: the same tokens have the same log probabilities."""
    body = {"prompt": LONG[:300], "max_tokens": 12, "logprobs": 2, "return_token_ids": True, "ignore_eos": True}
    together, alone = (answer.json()["choices"][0] for answer in both_ways(stack, "/v1/completions", body))
    assert together["token_ids"] == alone["token_ids"]
    assert together["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
    assert together["logprobs"]["token_logprobs"] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-3)
    streamed = both_ways(stack, "/v1/completions", body | {"stream": True})
    for answer in streamed:
        told = [choice["logprobs"] for event in events_of(answer) for choice in event["choices"] if choice["logprobs"]]
        numbers = [number for logprobs in told for number in logprobs["token_logprobs"]]
        assert numbers == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-3)
    prompt = together["prompt_token_ids"] + together["token_ids"]
    asked = {"model": "smollm2-135m", "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 2, "temperature": 0}
    echoed = stack.post("/v1/completions", asked, handover="auto").json()["choices"][0]
    assert echoed["text"].startswith(LONG[:300] + together["text"])
    of_prompt, num_generated = echoed["logprobs"], len(together["token_ids"])
    assert len(of_prompt["tokens"]) == len(prompt) + 2
    assert of_prompt["token_logprobs"][0] is of_prompt["top_logprobs"][0] is None
    assert of_prompt["tokens"][-num_generated - 2 : -2] == together["logprobs"]["tokens"]
    expected = together["logprobs"]["token_logprobs"]
    assert of_prompt["token_logprobs"][-num_generated - 2 : -2] == pytest.approx(expected, abs=1e-3)
    ends = [*of_prompt["text_offset"][1:], len(echoed["text"])]
    assert [echoed["text"][start:end] for start, end in zip(of_prompt["text_offset"], ends, strict=True)] == of_prompt[
        "tokens"
    ]


def test_a_prompt_s_log_probabilities_are_one_worker_s_and_the_same_in_both_dialects(stack):
    chat = {"messages": [{"role": "user", "content": LONG[:200]}], "max_tokens": 2, "temperature": 0}
    asked = {"model": "smollm2-135m", "prompt_logprobs": 1, "return_token_ids": True}
    told = stack.post("/v1/chat/completions", chat | asked, handover="auto").json()
    prompt = told["prompt_token_ids"]
    first, *rest = told["prompt_logprobs"]
    assert (first, len(rest)) == (None, len(prompt) - 1)
    assert all(str(token) in ranked for token, ranked in zip(prompt[1:], rest, strict=True))
    completion = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
    again = stack.post("/v1/completions", completion | asked, handover="never").json()["choices"][0]["prompt_logprobs"]
    for ranked, other in zip(rest, again[1:], strict=True):
        assert ranked.keys() == other.keys()
        for token, entry in ranked.items():
            assert entry["logprob"] == pytest.approx(other[token]["logprob"], abs=1e-3)
            assert entry["rank"] == other[token]["rank"]
    refused = stack.post("/v1/chat/completions", chat | asked, handover="always")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-headrace-handover")


def running():
    """pid → parent of all that run; a zombie only waits for its parent to look."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(folder.name)] = int(fields[1])
    return found


def test_zz_ctrl_c_stops_everything_in_peace_and_leaves_no_orphan(stack):
    family = running()
    below = {stack.process.pid}
    while more := {pid for pid, parent in family.items() if parent in below} - below:
        below |= more
    assert len(below) >= 7  # etcd, NATS, a gateway, two workers and their engines
    assert stack.stop() == 0
    deadline = time.monotonic() + 120
    while left := below & running().keys():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    for log in (stack.said(), *((stack.state / f"{worker}.log").read_text() for worker in ("prefill-1", "decode-1"))):
        assert not re.search("ERROR|Traceback|leaked|kill", log), log
