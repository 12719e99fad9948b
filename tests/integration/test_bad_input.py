"""What bad input gets: 4xx in OpenAI's shape, naming field, value and limit; no worker ever sees it."""

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SIM_MODEL = Path(__file__).parents[2] / "workers" / "sim" / "model"
LIMIT = 32768
USER = [{"role": "user", "content": "hi"}]
HUNDRED_MB = 100 * 1024 * 1024


def chat(**fields):
    return json.dumps({"model": "sim", "messages": USER, **fields}).encode()


BAD = [
    # name, body, param, code, words in the message
    ("no JSON", b'{"model": "sim", ', None, "invalid_json", ["JSON"]),
    ("no body", b"", None, "invalid_json", ["JSON"]),
    ("no UTF-8", b'{"model": "\xff\xfe"}', None, "invalid_json", ["JSON"]),
    ("no object", b"[1, 2]", None, "invalid_type", ["object"]),
    ("deep nesting", b'{"model": "sim", "metadata": ' + b"[" * 100_000, None, "invalid_json", []),
    ("nothing", b"{}", "model", "missing_required_parameter", ["model"]),
    ("no messages", b'{"model": "sim"}', "messages", "missing_required_parameter", ["messages"]),
    ("text for messages", chat(messages="hi"), "messages", "invalid_type", ['"hi"']),
    ("text for a number", chat(max_tokens="many"), "max_tokens", "invalid_type", ['"many"']),
    ("a fraction for a count", chat(n=1.5), "n", "invalid_type", ["1.5"]),
    ("a number for text", chat(messages=[{"role": "user", "content": 7}]), "messages[0].content", None, ["7"]),
    ("an unknown model", chat(model="gpt-4o"), "model", "model_not_found", ["'gpt-4o'"]),
    ("empty messages", chat(messages=[]), "messages", None, ["at least one"]),
    ("an unknown role", chat(messages=[{"role": "boss", "content": "hi"}]), "messages[0].role", None, ["boss"]),
    ("no content", chat(messages=[{"role": "user"}]), "messages[0].content", None, []),
    ("no tokens wanted", chat(max_tokens=0), "max_tokens", None, ["0", "1"]),
    ("fewer than no tokens", chat(max_tokens=-5), "max_tokens", None, ["-5"]),
    ("too many tokens", chat(max_tokens=40_000), "messages", "context_length_exceeded", ["40000", "32768"]),
    ("far too many tokens", chat(max_tokens=10**30), "messages", None, ["0000000", "32768"]),
    ("a long prompt", chat(messages=[{"role": "user", "content": "x" * 40_000}]), "messages", "context_length_exceeded",
     ["40", "32768"]),
    ("too hot", chat(temperature=2.5), "temperature", None, ["2.5", "2"]),
    ("no temperature at all", chat(temperature=float("nan")), None, "invalid_json", []),
    ("a negative top_p", chat(top_p=-1), "top_p", None, ["-1", "0"]),
    ("too many choices", chat(n=1000), "n", None, ["1000", "128"]),
    ("no choice", chat(n=0), "n", None, ["0", "1"]),
    ("an empty stop string", chat(stop=""), "stop", None, ["empty"]),
    ("many stop strings", chat(stop=["a"] * 100), "stop", None, ["100", "16"]),
    ("many logprobs", chat(logprobs=True, top_logprobs=99), "top_logprobs", None, ["99", "20"]),
    ("a token of no vocabulary", chat(logit_bias={"99999": 1}), "logit_bias", None, ["99999", "259"]),
    ("options for no stream", chat(stream_options={"include_usage": True}), "stream_options", None, ["stream"]),
    ("handover parameters", chat(kv_transfer_params={"remote_engine_id": "x"}), "kv_transfer_params", None, []),
    ("a tool without a name", chat(tools=[{"type": "function"}]), "tools[0]", "missing_required_parameter", []),
]  # fmt: skip


async def test_a_field_that_nobody_knows_is_named_in_the_head_and_changes_nothing(api):
    body = chat(temprature=1, max_tokens=3, seed=1, mood={"deep": [1]})
    response = await api.post("/v1/chat/completions", content=body)
    assert response.status_code == 200
    assert response.headers["x-headrace-ignored"] == "temprature, mood"
    plain = await api.post("/v1/chat/completions", content=chat(max_tokens=3, seed=1))
    assert "x-headrace-ignored" not in plain.headers
    assert plain.json()["choices"] == response.json()["choices"]


CONVERSATION = {"model": "sim", "messages": USER}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CONVERSATION | {"max_tokens": 1}),
        ("/v1/completions", {"model": "sim", "prompt": "hi", "max_tokens": 1}),
        ("/v1/messages", CONVERSATION | {"max_tokens": 1}),
        ("/v1/messages/count_tokens", CONVERSATION),
        ("/v1/responses", {"model": "sim", "input": "hi", "max_output_tokens": 1}),
        ("/v1/responses/input_tokens", {"model": "sim", "input": "hi"}),
        ("/v1/routes", CONVERSATION),
        ("/tokenize", CONVERSATION),
        ("/tokenize", {"model": "sim", "prompt": "hi"}),
        ("/detokenize", {"model": "sim", "tokens": [65]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_whatever_is_asked_names_and_counts_the_fields_that_nobody_knows(api, path, body):
    before = await api.metric("headrace_ignored_fields_total")
    response = await api.post(path, json=body | {"mill": 1, "weir": None})
    assert (response.status_code, response.headers.get("x-headrace-ignored")) == (200, "mill, weir"), response.text
    assert await api.metric("headrace_ignored_fields_total") == before + 2


async def _counts(api):
    """All that a worker counts of what it has seen."""
    fleet = await api.fleet()
    return {name: (w["load"]["seq"], w["load"]["num_cached"], w["load"]["digest"]) for name, w in fleet.items()}


async def _refused(api, response, param, code, words):
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert code is None or error["code"] == code
    assert all(word in error["message"] for word in words), error["message"]
    assert len(error["message"]) < 1000
    request = response.headers["x-request-id"]
    assert (await api.get(f"/v1/routes/{request}")).status_code == 404, "the router has not seen it"


@pytest.mark.parametrize(("body", "param", "code", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_a_bad_chat_is_refused_and_no_worker_sees_it(api, until, body, param, code, words):
    await until(api.is_idle)
    before = await _counts(api)
    response = await api.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    await _refused(api, response, param, code, words)
    assert await _counts(api) == before


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", []),
        ({"prompt": []}, "prompt", []),
        ({"prompt": [99999]}, "prompt", ["99999", "259"]),
        ({"prompt": [-1]}, "prompt", ["-1"]),
        ({"prompt": [1, "x"]}, "prompt", ['"x"']),
        ({"prompt": ["a", 7]}, "prompt[1]", ["7"]),
        ({"prompt": [5] * 40_000}, "prompt", ["40000", "32768"]),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", ["0"]),
        ({"prompt": "x", "logprobs": 50}, "logprobs", ["50", "20"]),
        ({"prompt": "x", "best_of": 3}, "best_of", []),
        ({"messages": USER}, "prompt", ["prompt"]),
    ],
)  # fmt: skip
async def test_a_bad_completion_is_refused(api, fields, param, words):
    response = await api.post("/v1/completions", json={"model": "sim", **fields})
    await _refused(api, response, param, None, words)


async def test_a_body_of_100_mb_is_refused_before_it_is_read(api):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/routes"):
        reader, writer = await asyncio.open_connection(*_address(api))
        head = (
            f"POST {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: {HUNDRED_MB}\r\n\r\n"
        )
        writer.write(head.encode())
        await _too_large(reader, writer)


async def test_a_body_of_100_mb_in_chunks_is_refused_as_soon_as_it_is_too_long(api):
    reader, writer = await asyncio.open_connection(*_address(api))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n")
    answer = asyncio.create_task(_too_large(reader, writer))
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    for _ in range(100):
        if answer.done():
            break
        with contextlib.suppress(ConnectionError):
            writer.write(chunk)
            await writer.drain()
    await answer


async def test_a_whole_body_of_100_mb_gets_its_answer(api, stack):
    body = json.dumps({"model": "sim", "messages": [{"role": "user", "content": "x" * HUNDRED_MB}]}).encode()
    curl = await asyncio.create_subprocess_exec(
        "curl", "-sS", f"{api.url}/v1/chat/completions", "-H", "content-type: application/json", "-H", "expect:",
        "--data-binary", "@-", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await curl.communicate(body)
    assert json.loads(output)["error"]["code"] == "body_too_large"
    assert stack.gateway.process.is_running


async def _too_large(reader, writer):
    async with asyncio.timeout(60):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 413"), head
        length = int(next(line for line in head.splitlines() if line.startswith("content-length")).split(": ")[1])
        error = json.loads(await reader.readexactly(length))["error"]
    writer.close()
    assert (error["code"], error["type"]) == ("body_too_large", "invalid_request_error")
    assert str(1024 * 1024 + 64 * LIMIT) in error["message"], "what a context of LIMIT tokens can need"


def _address(api):
    host, port = api.url.removeprefix("http://").split(":")
    return host, int(port)


async def test_what_is_no_route_is_told_in_the_same_shape(api):
    for response, status in (
        (await api.get("/v1/nothing"), 404),
        (await api.get("/v1/chat/completions"), 405),
        (await api.post("/v1/models"), 405),
    ):
        assert response.status_code == status
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert response.request.url.path in error["message"]


RAISING = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "divides": "{{ 1 // 0 }}",
    "undefined": "{{ messages[0]['nowhere']['content'] }}",
    "escapes": "{{ ''.__class__.__mro__ }}",
}


async def test_a_template_that_raises_is_the_clients_error(site, reach, until, tmp_path):
    for name, template in RAISING.items():
        folder = tmp_path / name
        shutil.copytree(SIM_MODEL, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        site.start_worker(f"both-{name}", "--model", str(folder))
    gateway = await site.gateway(num_workers=len(RAISING))
    async with reach(gateway) as api:
        assert {model["id"] for model in (await api.get("/v1/models")).json()["data"]} == set(RAISING)
        await until(api.is_idle)
        before = await _counts(api)
        for name in RAISING:
            response = await api.post("/v1/chat/completions", content=chat(model=name))
            words = ["roles must alternate"] if name == "raises" else ["template"]
            await _refused(api, response, "messages", None, words)
        assert await _counts(api) == before
        for name in RAISING:
            completion = await api.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 2})
            assert completion.status_code == 200


async def test_the_fleet_serves_on_after_all_of_it(api, unique):
    for _, body, *_ in BAD:
        assert (await api.post("/v1/chat/completions", content=body)).status_code < 500
    usage = (await api.chat(unique, max_tokens=LIMIT - 200, timeout_ms=60_000, ignore_eos=False)).json()["usage"]
    assert usage["completion_tokens"] > 0


async def test_a_head_that_is_too_large_is_counted_though_no_route_sees_it(api):
    before = await api.metric("headrace_connections_refused_total", code="head_too_large")
    response = await api.get("/live", headers={"x-mill": "x" * 70_000})
    assert response.status_code == 431
    assert await api.metric("headrace_connections_refused_total", code="head_too_large") == before + 1
