"""`headrace up` for end-to-end tests: real vLLM, etcd and NATS, one prefill and one decode worker."""

import re
import signal
import time

import httpx

from loadtest.processes import free_port
from tests.up import start_up

MOST_JSON_TOKENS = 640
"""Whatever a model draws, an answer to a schema of these tests is no longer, a token a character: `MAX_WHITESPACE` (20)
in each of 18 places, 20 characters of a string as six of an escape each, and names, numbers and brackets."""


READY_S = 1800
"""Two engines that start take a minute of CPU each; the machine may have other things to do."""


class Stack:
    """`headrace up` as a newcomer starts it (the demo model runs in float32), one prefill and one decode worker."""

    def __init__(self, folder, *flags, env=None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = folder / "output"
        self.state = folder / "state"
        environment = {"HEADRACE_KV_CACHE_BYTES": str(128 << 20)} | (env or {})
        own = ("--state-dir", str(self.state), "--ready-timeout-s", str(READY_S))
        self.process = start_up(self.port, self.output, *own, *flags, env=environment)

    def said(self):
        return self.output.read_text()

    def wait_until_ready(self):
        deadline = time.monotonic() + READY_S
        while "Headrace listens on" not in self.said() or "curl" not in self.said().rpartition("listens on")[2]:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)
        return self

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(300)

    def metric(self, name):
        text = httpx.get(f"{self.url}/metrics", timeout=600).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}(\{{| )", line))

    def post(self, path, body, *, handover):
        """The answer, whatever it is."""
        return httpx.post(f"{self.url}{path}", json=body, headers={"x-headrace-handover": handover}, timeout=600)

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
        answer = self.post("/v1/chat/completions", body, handover=handover)
        assert answer.status_code == 200, answer.text
        return answer

    @staticmethod
    def tokens(answer):
        return [entry["token"] for entry in answer.json()["choices"][0]["logprobs"]["content"]]
