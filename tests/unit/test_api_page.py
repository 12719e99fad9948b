"""The generated page of the API: it is fresh, and what it says of a parameter is what the parsers do."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from app.openai.chat import parse_chat
from app.openai.completions import parse_completion
from app.openai.responses.request import parse_response
from planes.wire.errors import InvalidRequest

ROOT = Path(__file__).parents[2]
USER = [{"role": "user", "content": "hi"}]
PARSERS: dict[str, Any] = {
    "/v1/chat/completions": (parse_chat, {"model": "m", "messages": USER}),
    "/v1/completions": (parse_completion, {"model": "m", "prompt": "hi"}),
    "/v1/responses": (lambda body: parse_response(body).parsed, {"model": "m", "input": "hi"}),
}
SAMPLES = {"n": 2, "max_tokens": 5, "prompt_logprobs": 1, "return_token_ids": True}
"""For fields whose type is looked at before they are refused."""


def load():
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = load()
DOCUMENT = MODULE.described()
ROWS = [(path, name, status) for path in PARSERS for name, status in MODULE.parameters(DOCUMENT, "post", path).items()]


def test_the_page_is_what_the_code_says():
    assert MODULE.TARGET.read_text() == MODULE.page(), "stale: run make docs"


def test_there_are_parameters_of_every_kind():
    assert {status for _, _, status in ROWS} >= {MODULE.SERVED, MODULE.IDLE, MODULE.REFUSED}


@pytest.mark.parametrize(("path", "name"), [row[:2] for row in ROWS if row[2] not in ("yes", "no effect")])
def test_what_is_told_as_refused_is_refused_by_name(path, name):
    parse, body = PARSERS[path]
    with pytest.raises(InvalidRequest) as caught:
        parse(json.dumps({**body, name: SAMPLES.get(name, "x")}).encode())
    assert caught.value.param == name


@pytest.mark.parametrize(("path", "name"), [row[:2] for row in ROWS if row[2] == "no effect"])
def test_what_is_told_to_have_no_effect_has_none(path, name):
    parse, body = PARSERS[path]
    without = parse(json.dumps(body).encode())
    parsed = parse(json.dumps({**body, name: "x"}).encode())
    assert parsed.ignored == ()
    assert _told(parsed) == _told(without)


def _told(parsed):
    return {name: getattr(parsed, name) for name in parsed.__struct_fields__ if name != "num_bytes"}


def test_a_peer_s_table_names_its_source():
    for peer in json.loads(MODULE.PEERS.read_text()):
        assert peer["source"]
        assert set(peer["fields"]) <= set(DOCUMENT["paths"])
