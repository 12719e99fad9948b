"""A streamed chat with a fleet, looked at while it runs."""

import json
import threading
from typing import Self

import httpx

from tests.docker.commands import PATIENCE_S


class Conversation:
    """Streams one answer in a thread of its own. `text` is what has come; `served_by` the decode worker it began on."""

    def __init__(self, url: str, prompt: str, *, max_tokens: int) -> None:
        self.text = ""
        self.num_pieces = 0
        self.is_complete = False
        self.error = ""
        self.headers = httpx.Headers()
        self._request = {
            "model": "sim",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        self._url = url
        self._thread = threading.Thread(target=self._read)

    def begin(self) -> Self:
        self._thread.start()
        return self

    def end(self) -> Self:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the answer does not end"
        assert not self.error, self.error
        return self

    @property
    def served_by(self) -> tuple[str, str]:
        return self.headers["x-headrace-prefill"], self.headers["x-headrace-decode"]

    def _read(self) -> None:
        url, headers = f"{self._url}/v1/chat/completions", {"x-headrace-handover": "always"}
        try:
            with httpx.stream("POST", url, json=self._request, headers=headers, timeout=PATIENCE_S) as reply:
                self.headers = reply.headers
                if reply.status_code != 200:
                    self.error = reply.read().decode()
                    return
                for line in reply.iter_lines():
                    self._take(line.removeprefix("data: "))
        except httpx.HTTPError as exc:
            self.error = f"{type(exc).__name__}: {exc}"

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.is_complete = True
        elif data.startswith("{"):
            event = json.loads(data)
            if "error" in event:
                self.error = data
                return
            self.num_pieces += 1
            self.text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def answer(url: str, prompt: str, *, max_tokens: int = 32) -> Conversation:
    """A whole answer."""
    said = Conversation(url, prompt, max_tokens=max_tokens).begin().end()
    assert said.is_complete
    assert said.text
    return said
