"""What a newcomer does: `headrace up`, the printed curl, a look at what it says of itself. Real model, real parts."""

import asyncio
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest

from tests.up import free_port, start_up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LONG = " ".join(
    f"Note {i}: gate {i * 7 % 13} of the weir lets {i * i % 17} buckets of water a minute to the wheel."
    for i in range(30)
)


class Stack:
    """`headrace up` as a newcomer starts it (the demo model runs in float32), one prefill and one decode worker."""

    def __init__(self, folder):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = folder / "output"
        self.state = folder / "state"
        environment = {"HEADRACE_KV_CACHE_BYTES": str(128 << 20)}
        self.process = start_up(self.port, self.output, "--state-dir", str(self.state), env=environment)

    def said(self):
        return self.output.read_text()

    def wait_until_ready(self):
        deadline = time.monotonic() + 400
        while "Headrace listens on" not in self.said() or "curl" not in self.said().rpartition("listens on")[2]:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)
        return self

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(90)

    def metric(self, name):
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}(\{{| )", line))

    def chat(self, content, *, handover, salt, max_tokens=16):
        body = {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": salt,
            "logprobs": True,
        }
        answer = httpx.post(
            f"{self.url}/v1/chat/completions", json=body, headers={"x-headrace-handover": handover}, timeout=120
        )
        assert answer.status_code == 200, answer.text
        return answer

    @staticmethod
    def tokens(answer):
        return [entry["token"] for entry in answer.json()["choices"][0]["logprobs"]["content"]]


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
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=120) as client:
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
    block_size = httpx.get(f"{stack.url}/v1/fleet").json()["workers"][0]["facts"]["block_size"]
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
    route = httpx.get(f"{stack.url}/v1/routes/{answer.headers['x-request-id']}").json()
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
    "properties": {"place": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "maximum": 14}},
    "required": ["place", "days"],
    "additionalProperties": False,
}


@pytest.fixture
async def handing_over(stack):
    headers = {"x-headrace-handover": "always"}
    async with openai.AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="none", timeout=300, max_retries=0, default_headers=headers
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
            "max_tokens": 300,
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
            "max_tokens": 300,
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
    deadline = time.monotonic() + 20
    while left := below & running().keys():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    for log in (stack.said(), *((stack.state / f"{worker}.log").read_text() for worker in ("prefill-1", "decode-1"))):
        assert not re.search("ERROR|Traceback|leaked|kill", log), log
