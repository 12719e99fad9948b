"""Streamed chats under locust, with time to first token and gaps between tokens as entries of their own.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 16 -r 4 -t 60s

`HEADRACE_LOAD_MODEL` (default: the first model the gateway lists), `HEADRACE_LOAD_WORDS` (prompt length, default 60),
`HEADRACE_LOAD_TOKENS` (answer length, default 80), `HEADRACE_LOAD_SHARED` (share of the prompt that all users have in
common, default 0.5) and `HEADRACE_LOAD_KEY` (API key) change the load.
"""

import json
import os
import random
import time

from locust import HttpUser, between, task
from locust.clients import ResponseContextManager

WORDS = int(os.environ.get("HEADRACE_LOAD_WORDS", "60"))
TOKENS = int(os.environ.get("HEADRACE_LOAD_TOKENS", "80"))
SHARED = float(os.environ.get("HEADRACE_LOAD_SHARED", "0.5"))
KEY = os.environ.get("HEADRACE_LOAD_KEY", "")
VOCABULARY = ["river", "water", "wheel", "mill", "stone", "weir", "gate", "flow", "race", "pond", "sluice", "turbine"]


class ChatUser(HttpUser):
    """Somebody who chats: one streamed answer after the other."""

    wait_time = between(0.1, 1.0)

    def on_start(self) -> None:
        """Learn the model's name; make the part of the prompt that is the same for everybody."""
        if KEY:
            self.client.headers["authorization"] = f"Bearer {KEY}"
        listed = self.client.get("/v1/models").json()["data"]
        self.model = os.environ.get("HEADRACE_LOAD_MODEL") or listed[0]["id"]
        same_for_all = random.Random(0)
        self.shared = " ".join(same_for_all.choices(VOCABULARY, k=int(WORDS * SHARED)))

    @task
    def chat(self) -> None:
        """One streamed chat. Failures carry the server's own message."""
        own = " ".join(random.choices(VOCABULARY, k=WORDS - int(WORDS * SHARED)))
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"{self.shared} {own}"}],
            "max_tokens": TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_at = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, name="chat: whole answer"
        ) as response:
            if response.status_code != 200:
                response.failure(response.text[:500])
                return
            error = self._read(response, sent_at)
            response.request_meta["response_time"] = (time.perf_counter() - sent_at) * 1000  # locust's ends at the head
            response.failure(error) if error else response.success()

    def _read(self, response: ResponseContextManager, sent_at: float) -> str:
        """Read all events; report the first token, each gap and tokens per second. Returns an error or nothing."""
        last_at = None
        usage = None
        for line in response.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return str(event["error"])
            usage = event.get("usage") or usage
            if not any(choice["delta"].get("content") for choice in event["choices"]):
                continue
            now = time.perf_counter()
            if last_at is None:
                self._report("chat: first token", now - sent_at)
            else:
                self._report("chat: gap between tokens", now - last_at)
            last_at = now
        if usage is None:
            return "the stream ended without usage"
        return "" if last_at is not None else "the answer has no text"

    def _report(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE", name=name, response_time=seconds * 1000, response_length=0, exception=None, context={}
        )
