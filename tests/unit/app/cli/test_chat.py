"""`headrace chat` against a gateway that says what the test wants."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app.cli.chat import ChatSettings, Piece, chat, pieces
from app.cli.gateway_url import GatewayRefused

HEADERS = {"x-headrace-prefill": "p0", "x-headrace-decode": "d0", "x-request-id": "r1"}


def event(text):
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n'
ANSWER = [event("hell"), b"\n", b": keep-alive\n", event("o\x1b"), USAGE, b"data: [DONE]\n"]


class Gateway:
    """Answers each POST with the next of `answers`."""

    def __init__(self, *answers, models=("sim",)):
        self.bodies, self.headers = [], []
        gateway, waiting = self, list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(json.dumps({"data": [{"id": name} for name in models]}).encode())

            def do_POST(self):
                gateway.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                gateway.headers.append(dict(self.headers))
                self.reply(b"".join(waiting.pop(0)))

            def reply(self, body):
                self.send_response(200)
                for name, value in HEADERS.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_): ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_each_question_goes_with_what_was_said_before():
    out = io.StringIO()
    with Gateway(ANSWER, ANSWER) as gateway:
        settings = ChatSettings(url=gateway.url, api_key="sk-1", system="be brief", handover="always")
        chat(settings, asked=["one\n", "  ", "two"], out=out)
    first, second = gateway.bodies
    assert first["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "hello\x1b"},
        {"role": "user", "content": "two"},
    ]
    assert (first["model"], first["stream"]) == ("sim", True)
    sent = {name.lower(): value for name, value in gateway.headers[0].items()}
    assert (sent["x-headrace-handover"], sent["authorization"]) == ("always", "Bearer sk-1")
    told = out.getvalue()
    assert "hello\\x1b" in told, "an answer cannot steer the terminal"
    assert "[p0 → d0, 9 prompt tokens, 0 cached, 2 generated, first after " in told
    assert "r1]" in told


def test_a_failed_question_is_told_and_not_remembered():
    out = io.StringIO()
    broken = [event("hell"), b'data: {"error":{"message":"the worker is lost"}}\n']
    with Gateway(broken, ANSWER) as gateway:
        chat(ChatSettings(url=gateway.url), asked=["one", "two"], out=out)
    assert "the worker is lost" in out.getvalue()
    assert gateway.bodies[1]["messages"] == [{"role": "user", "content": "two"}]


def test_without_a_model_there_is_nobody_to_talk_to():
    with Gateway(models=()) as gateway, pytest.raises(GatewayRefused, match="no worker is registered"):
        chat(ChatSettings(url=gateway.url), asked=["one"])


def test_a_stream_without_its_end_is_no_answer():
    found = []
    with pytest.raises(GatewayRefused, match="middle of an answer"):
        found += pieces([event("hell")])
    assert list(pieces(ANSWER))[:2] == [Piece("hell"), Piece("o\x1b")]
