"""Workers are killed in the middle of what is hard to cut; every client's bytes are those of an undisturbed answer."""

import asyncio
import json
import re

import httpx
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

MIDDLE_BYTES = 900
"""So long is the middle of each story, which is said again and again: long enough to be killed in."""
NUM_EVENTS = 30
"""After so many each client is in the middle."""
STOP = "so be it!"
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
CALL = '<tool_call>{"name": "weather", "arguments": {'
STORIES = {
    "thoughts": ("<think>hm", " and hm", "</think>Yes."),
    "arguments": (f'I look. {CALL}"at": "', "sea \\n", '"}}</tool_call> done'),
    "second call": (
        f'{CALL}}}}}</tool_call>{CALL}"at": "',
        '\\u00e9\\"',
        '"}}</tool_call>',
    ),
    "json": ('{"a": "', 'b \\"', '"}'),
    "character": ("I say", "☃😀", "."),
    "half a stop string": ("I say", " so be it, so be it? ", STOP + " And more."),
}

CHANGING = re.compile(
    rb'(?<="chatcmpl-)[0-9a-f]+|(?<="resp_)[0-9a-f]+|(?<="msg_)[0-9a-f]+|(?<="call_)[0-9a-f]+|(?<="toolu_)[0-9a-f]+'
    rb'|(?<="fc_)[0-9a-f]+|(?<="rs_)[0-9a-f]+'
    rb'|(?<="created":)\d+|(?<="created_at":)[\d.]+|(?<="completed_at":)[\d.]+'
    rb'|(?<=cached_tokens":)\d+|(?<=cache_write_tokens":)\d+|(?<="input_tokens":)\d+|(?<=cache_read_input_tokens":)\d+'
)
"""What differs between any two answers. Ids begin at a quote: one may end in "fc" before its item's "_1"."""


def test_only_ids_are_left_out_of_the_comparison():
    assert CHANGING.sub(b"0", b'"item_id":"fc_21fc_1","call_id":"call_7a"') == b'"item_id":"fc_0_1","call_id":"call_0"'


def chat(prompt):
    tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"tools": [tool], "stop": [STOP], "stream_options": options, "return_token_ids": True}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], "max_tokens": 4000, **asked}


def response(prompt):
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    return "/v1/responses", {"input": prompt, "tools": [tool], "store": False, "max_output_tokens": 4000}


def message(prompt):
    tool = {"name": "weather", "input_schema": PARAMETERS}
    asked = {"tools": [tool], "stop_sequences": [STOP], "max_tokens": 4000}
    return "/v1/messages", {"messages": [{"role": "user", "content": prompt}], **asked}


DIALECTS = {"chat": chat, "response": response, "message": message}


class Answer:
    """One client: what it reads, and when it has read so much."""

    def __init__(self, url, dialect, story, unique):
        self.written = b""
        self.is_midway = asyncio.Event()
        self._url = url
        self._route, self._body = DIALECTS[dialect](f"{dialect} {story}: {unique}")
        start, middle, end = STORIES[story]
        self._script = start + MIDDLE_BYTES // len(middle.encode()) * middle + end

    async def read(self):
        headers = {"x-headrace-script": json.dumps([self._script])}
        body = {"model": "sim", "stream": True, **self._body}
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=180) as client,
            client.stream("POST", self._route, json=body, headers=headers) as answer,
        ):
            assert answer.status_code == 200, await answer.aread()
            async for piece in answer.aiter_bytes():
                self.written += piece
                if self.written.count(b"data: ") > NUM_EVENTS:
                    self.is_midway.set()
        return CHANGING.sub(b"0", self.written)


async def test_clients_read_what_they_would_have_read_without_the_loss(site, reach, unique):
    flags = ("--reasoning-parser", "think")
    lost = await site.worker("both-1", *flags, speedup=0.2)
    gateway = await site.gateway(num_workers=1)
    asked = [(dialect, story) for dialect in DIALECTS for story in STORIES]
    answers = [Answer(gateway.url, *each, unique) for each in asked]
    async with asyncio.TaskGroup() as clients:
        reading = [clients.create_task(answer.read()) for answer in answers]
        for answer in answers:
            await answer.is_midway.wait()
        assert not [each for each, task in zip(asked, reading, strict=True) if task.done()]
        lost.kill()
        await site.worker("both-2", *flags)
    async with reach(gateway) as api:
        assert await api.metric("headrace_migrations_total") >= len(answers)
    for each, task in zip(asked, reading, strict=True):
        assert task.result() == await Answer(gateway.url, *each, unique).read(), each
