import asyncio
from types import SimpleNamespace

import pytest

from app.http.connection import EXTENSION
from app.http.cors import cross_origin
from app.http.origins import parse_origins
from planes.wire.errors import UnusableSetting

PAGE = "https://chat.example"


class Asked:
    """One request to an application for these origins."""

    def __init__(self, origins, method="POST", **headers):
        self.sent, self.served = [], 0
        self.cycle = SimpleNamespace(default_headers=[(b"date", b"today")])
        scope = {
            "type": "http",
            "method": method,
            "path": "/v1/chat/completions",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
            "extensions": {EXTENSION: SimpleNamespace(cycle=self.cycle)},
        }
        asyncio.run(cross_origin(self.app, parse_origins(origins))(scope, None, self.send))

    async def app(self, scope, receive, send):
        self.served += 1

    async def send(self, message):
        self.sent.append(message)

    @property
    def head(self):
        return dict(self.cycle.default_headers)


def test_an_answer_to_an_allowed_page_names_its_origin():
    asked = Asked(f"https://other.example,{PAGE}", origin=PAGE)
    assert asked.served == 1
    assert asked.head == {
        b"date": b"today",
        b"access-control-allow-origin": PAGE.encode(),
        b"vary": b"origin",
        b"access-control-expose-headers": b"*",
    }


def test_a_preflight_is_answered_without_a_key():
    asked = Asked(
        PAGE,
        "OPTIONS",
        origin=PAGE,
        access_control_request_method="POST",
        access_control_request_headers="authorization,content-type",
    )
    assert asked.served == 0
    start, body = asked.sent
    headers = dict(start["headers"])
    assert (start["status"], body["body"]) == (204, b"")
    assert headers[b"access-control-allow-origin"] == PAGE.encode()
    assert headers[b"access-control-allow-headers"] == b"authorization,content-type"
    assert b"POST" in headers[b"access-control-allow-methods"]
    assert b"access-control-allow-credentials" not in headers


def test_with_a_star_every_page_may_ask():
    asked = Asked("*", origin="https://anybody.example")
    assert asked.head[b"access-control-allow-origin"] == b"*"
    assert b"vary" not in asked.head


@pytest.mark.parametrize("origins", ["", "https://other.example", "https://chat.example:8443"])
def test_other_pages_are_told_nothing(origins):
    asked = Asked(origins, "OPTIONS", origin=PAGE, access_control_request_method="POST")
    assert (asked.served, asked.sent) == (1, [])
    assert asked.head == {b"date": b"today"} | ({b"vary": b"origin"} if origins else {})


def test_who_is_no_page_is_served_as_ever():
    asked = Asked(PAGE)
    assert asked.served == 1
    assert asked.head == {b"date": b"today", b"vary": b"origin"}


@pytest.mark.parametrize("setting", ["chat.example", "https://chat.example/", "https://a b", "https://u@h"])
def test_what_is_no_origin_is_refused(setting):
    with pytest.raises(UnusableSetting, match="--cors-origin is"):
        parse_origins(setting)
