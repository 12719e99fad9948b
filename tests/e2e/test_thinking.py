"""A model that thinks, on real vLLM and through a handover: thoughts, their budget and their count, in each dialect."""

import asyncio
import json
import os
import re
import signal
from pathlib import Path

import httpx
import jsonschema
import pytest

from app.cli.role import RoleSettings, change_role
from planes.wire.messages import Role, WorkerId
from tests.e2e.stack import MOST_JSON_TOKENS, Stack
from tests.e2e.thinking_model import END_THINK

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

QUESTION = [{"role": "user", "content": "Tell me about rivers."}]
LASTING = {"logit_bias": {str(END_THINK): -100}}
"""Nothing but its budget ends a thought."""
RIVER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "length_km": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["name", "length_km"],
    "additionalProperties": False,
}
WAYS = ("always", "never")


@pytest.fixture(scope="module")
def stack(tmp_path_factory, thinking_model):
    folder = tmp_path_factory.mktemp("up")
    environment = {
        "HEADRACE_DTYPE": "float32",
        "HEADRACE_REASONING_PARSER": "think",
        "HEADRACE_REPLACEMENT_S": "600",
    }
    workers = ("--prefill", "0", "--decode", "0", "--both", "2")  # what was started so can change its role
    running = Stack(folder, "--model", str(thinking_model), *workers, env=environment)
    try:
        yield running.wait_until_ready()
    finally:
        if running.process.poll() is None:
            running.stop()


def chat(**more):
    return "/v1/chat/completions", {"messages": QUESTION, "max_tokens": 40, "temperature": 0} | more


def response(**more):
    return "/v1/responses", {"input": QUESTION, "max_output_tokens": 40, "temperature": 0, "store": False} | more


def message(**more):
    return "/v1/messages", {"messages": QUESTION, "max_tokens": 40, "temperature": 0} | more


def ask(stack, asked, handover):
    path, body = asked
    answer = stack.post(path, {"model": "thinker"} | body, handover=handover)
    assert answer.status_code == 200, answer.text
    return answer


def events_of(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def chat_split(told):
    """Thought, text and the count of the thought's tokens."""
    said = told["choices"][0]["message"]
    assert said.get("reasoning") == said.get("reasoning_content")
    return (
        said.get("reasoning", ""),
        said["content"] or "",
        told["usage"]["completion_tokens_details"]["reasoning_tokens"],
    )


def streamed_chat_split(events):
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    thought, text = ("".join(delta.get(kind) or "" for delta in deltas) for kind in ("reasoning", "content"))
    return thought, text, events[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"]


def response_split(told):
    texts = {"reasoning": "", "message": ""} | {item["type"]: item["content"][0]["text"] for item in told["output"]}
    return texts["reasoning"], texts["message"], told["usage"]["output_tokens_details"]["reasoning_tokens"]


def streamed_response_split(events):
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    thought, text = (
        "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")
        for kind in ("reasoning_text", "output_text")
    )
    return thought, text, response_split(events[-1]["response"])[2]


def message_split(told):
    texts = {"thinking": "", "text": ""} | {block["type"]: block[block["type"]] for block in told["content"]}
    return texts["thinking"], texts["text"], thinking_tokens(told["usage"])


def streamed_message_split(events):
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    thought, text = ("".join(delta.get(kind) or "" for delta in deltas) for kind in ("thinking", "text"))
    usage = next(event["usage"] for event in events if event["type"] == "message_delta")
    return thought, text, thinking_tokens(usage)


def thinking_tokens(usage):
    return usage.get("output_tokens_details", {"thinking_tokens": 0})["thinking_tokens"]


DIALECTS = {
    "chat": (chat, chat_split, streamed_chat_split),
    "response": (response, response_split, streamed_response_split),
    "message": (message, message_split, streamed_message_split),
}
USAGE_TOO = {"stream_options": {"include_usage": True}}


def splits(stack, dialect, **more):
    """The same answer streamed and whole, from two workers and from one."""
    request, whole, streamed = DIALECTS[dialect]
    streaming = {"stream": True} | (USAGE_TOO if dialect == "chat" else {})
    return [
        split
        for handover in WAYS
        for split in (
            whole(ask(stack, request(**more), handover).json()),
            streamed(events_of(ask(stack, request(**more, **streaming), handover))),
        )
    ]


def test_a_thought_is_told_apart_from_the_answer_alike_in_every_dialect(stack):
    every = [split for dialect in DIALECTS for split in splits(stack, dialect)]
    assert len(every) == 12
    assert len(set(every)) == 1
    thought, text, num_thoughts = every[0]
    assert thought.startswith("Rivers are")  # up to its first full stop
    assert "." not in thought
    assert text
    assert len(thought.split()) <= num_thoughts < 40


@pytest.mark.parametrize("budget", [4, 8])
def test_a_budget_ends_the_thought_in_every_dialect(stack, budget):
    budgets = {
        "chat": {"thinking_token_budget": budget},
        "response": {"thinking_token_budget": budget},
        "message": {"thinking": {"type": "enabled", "budget_tokens": budget}},
    }
    every = [split for dialect, asked in budgets.items() for split in splits(stack, dialect, **asked)]
    assert len(set(every)) == 1
    thought, text, num_thoughts = every[0]
    assert 1 <= len(thought.split()) < budget  # it begins with another line break
    assert text
    assert num_thoughts == budget  # the prompt's line break is one of the budget's, and the closing tag one of these


def test_a_budget_counts_tokens_whatever_the_model_would_think(stack):
    asked = chat(**LASTING, thinking_token_budget=12, return_token_ids=True)
    for handover in WAYS:
        tokens = ask(stack, asked, handover).json()["choices"][0]["token_ids"]
        assert tokens.index(END_THINK) == 12 - 1  # as in vLLM, what the prompt has behind the opening tag counts
        assert tokens.count(END_THINK) == 1


def test_who_wants_no_thoughts_gets_none(stack):
    wishes = {
        "chat": {"reasoning_effort": "none"},
        "response": {"reasoning": {"effort": "none"}},
        "message": {"thinking": {"type": "disabled"}},
    }
    every = [split for dialect, asked in wishes.items() for split in splits(stack, dialect, **asked)]
    assert len(set(every)) == 1
    thought, text, num_thoughts = every[0]
    assert (thought, num_thoughts) == ("", 0)
    assert text


@pytest.mark.parametrize("budget", [0, 5])
def test_a_schema_binds_what_follows_the_thought(stack, budget):
    wanted = {"type": "json_schema", "json_schema": {"name": "river", "schema": RIVER}}
    asked = {"response_format": wanted, "thinking_token_budget": budget, "max_tokens": MOST_JSON_TOKENS}
    every = splits(stack, "chat", **asked)
    assert len(set(every)) == 1
    thought, text, num_thoughts = every[0]
    jsonschema.validate(json.loads(text), RIVER)
    assert num_thoughts == max(budget, 1)
    assert bool(thought) == (budget > 0)


def worker_pid(stack, worker):
    """Of the process that this stack has started to serve as `worker`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == stack.process.pid and b"workers" in words and worker.encode() in words:
            return int(folder.name)
    raise AssertionError(f"{worker} does not run")


def become(stack, worker, role, **settings):
    """What `headrace role` does."""
    told = dict(re.findall(r"HEADRACE_(ETCD|NAMESPACE)=(\S+)", stack.said()))
    wish = RoleSettings(etcd=told["ETCD"], namespace=told["NAMESPACE"], wait_s=300, **settings)
    is_changed, said = asyncio.run(change_role(WorkerId(worker), role, wish))
    assert is_changed, said


def test_a_worker_gives_up_decoding_under_a_stream_which_goes_on_elsewhere_token_for_token(stack):
    path, body = chat(max_tokens=160, ignore_eos=True, return_token_ids=True, stream=True)
    body |= {"model": "thinker"} | USAGE_TOO

    def stream(disturb=lambda worker: None):
        events, alone = [], {"x-headrace-handover": "never"}
        with httpx.stream("POST", f"{stack.url}{path}", json=body, headers=alone, timeout=600) as answer:
            worker = answer.headers["x-headrace-decode"]
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
                    if len(events) == 5:
                        disturb(worker)
        assert not [event for event in events if "error" in event]
        tokens = [token for event in events for choice in event["choices"] for token in choice.get("token_ids") or ()]
        return worker, tokens, streamed_chat_split(events)

    _, tokens, split = stream()
    assert len(tokens) == 160
    before = stack.metric("headrace_migrations_total")
    worker, again, split_again = stream(lambda worker: become(stack, worker, Role.PREFILL, migrate_after_s=0.0))
    assert (again, split_again) == (tokens, split)
    assert stack.metric("headrace_migrations_total") == before + 1
    pair = ask(stack, chat(), "always").headers
    assert pair["x-headrace-prefill"] == worker != pair["x-headrace-decode"]
    become(stack, worker, Role.BOTH)


def test_zz_a_thought_goes_on_after_its_worker_was_killed_and_its_budget_counts_once(stack):
    path, body = chat(**LASTING, thinking_token_budget=30, max_tokens=44, return_token_ids=True, stream=True)
    body |= {"model": "thinker"} | USAGE_TOO
    become(stack, "both-1", Role.PREFILL)  # nobody decodes until the other one is back
    undisturbed = streamed_chat_split(events_of(ask(stack, (path, body), "always")))
    events, headers = [], {"x-headrace-handover": "always"}
    with httpx.stream("POST", f"{stack.url}{path}", json=body, headers=headers, timeout=600) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
                if len(events) == 9:
                    os.kill(worker_pid(stack, "both-2"), signal.SIGKILL)
    assert streamed_chat_split(events) == undisturbed
    tokens = [token for event in events for choice in event["choices"] for token in choice.get("token_ids") or ()]
    assert (tokens.index(END_THINK), tokens.count(END_THINK), len(tokens)) == (30 - 1, 1, 44)
    assert stack.metric("headrace_migrations_total") >= 1
