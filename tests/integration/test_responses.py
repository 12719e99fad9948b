"""OpenAI's responses against real processes: whichever gateway is asked, and with NATS emptied in between."""

import json
from pathlib import Path

import httpx
import openai
import pytest

from tests.integration.conftest import poll_until
from tests.nats_servers import call, client_of, own_nats
from tests.openai_types import checked_event, checked_response, sse

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RECORDED = Path(__file__).parent / "recorded"
BODY = {"model": "sim", "input": "What drives a mill?", "max_output_tokens": 24, "ignore_eos": True}


@pytest.fixture
async def one(stack):
    async with httpx.AsyncClient(base_url=stack.gateway.url, timeout=180) as client:
        yield client


@pytest.fixture
async def other(stack):
    """Another gateway of the same namespace."""
    async with httpx.AsyncClient(base_url=stack.pairing.url, timeout=180) as client:
        yield client


async def made(client, **fields):
    response = await client.post("/v1/responses", json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def events(client, method="POST", url="/v1/responses", **fields):
    body = {"json": BODY | {"stream": True} | fields} if method == "POST" else {}
    response = await client.request(method, url, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    return sse(response.content)


def text_of(response):
    return "".join(part["text"] for item in response["output"] if "content" in item for part in item["content"])


async def test_streamed_and_whole_say_the_same_in_openais_types(one):
    whole = await made(one)
    checked_response(whole)
    told = await events(one)
    for event in told:
        checked_event(event)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    streamed = told[-1]["response"]
    assert "".join(event["delta"] for event in told if event["type"] == "response.output_text.delta") == text_of(whole)
    assert (streamed["status"], streamed["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert streamed["usage"] == whole["usage"] | {
        "input_tokens_details": streamed["usage"]["input_tokens_details"],
    }


async def test_any_gateway_has_what_another_has_answered(one, other):
    for stored in (await made(one), (await events(one))[-1]["response"]):
        found = await other.get(f"/v1/responses/{stored['id']}")
        assert found.status_code == 200
        assert found.json() == stored
        assert (await other.delete(f"/v1/responses/{stored['id']}")).json()["deleted"]
        gone = await one.get(f"/v1/responses/{stored['id']}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


async def test_what_is_not_stored_is_not_there(one):
    response = await made(one, store=False)
    assert response["store"] is False
    assert (await one.get(f"/v1/responses/{response['id']}")).status_code == 404


async def test_a_conversation_goes_on_at_another_gateway(one, other):
    first = await made(one, instructions="Be brief.")
    second = await made(other, input="And then?", previous_response_id=first["id"])
    third = await made(one, input="And in the end?", previous_response_id=second["id"])
    history = [
        {"role": "user", "content": BODY["input"]},
        *first["output"],
        {"role": "user", "content": "And then?"},
        *second["output"],
        {"role": "user", "content": "And in the end?"},
    ]
    assert text_of(await made(one, input=history)) == text_of(third)
    listed = (await other.get(f"/v1/responses/{third['id']}/input_items", params={"order": "asc", "limit": 4})).json()
    assert [item["role"] for item in listed["data"]] == ["user", "assistant", "user", "assistant"]
    assert listed["has_more"]
    rest = await other.get(
        f"/v1/responses/{third['id']}/input_items", params={"order": "asc", "after": listed["last_id"]}
    )
    assert [item["content"][0]["text"] for item in rest.json()["data"]] == ["And in the end?"]


async def test_an_item_may_be_meant_by_its_id(one, other):
    first = await made(one)
    by_id = [{"role": "user", "content": BODY["input"]}, {"type": "item_reference", "id": first["output"][0]["id"]}]
    itself = [{"role": "user", "content": BODY["input"]}, first["output"][0]]
    more = {"role": "user", "content": "Go on."}
    assert text_of(await made(other, input=[*by_id, more])) == text_of(await made(one, input=[*itself, more]))
    missing = await one.post("/v1/responses", json=BODY | {"input": [{"type": "item_reference", "id": "msg_1"}, more]})
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "item_not_found")


async def test_an_unknown_previous_response_is_refused(one):
    response = await one.post("/v1/responses", json=BODY | {"previous_response_id": "resp_" + "0" * 24})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "previous_response_not_found")


async def test_input_tokens_are_those_of_the_request(one):
    counted = (await one.post("/v1/responses/input_tokens", json=BODY)).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": (await made(one))["usage"]["input_tokens"]}


async def test_a_background_response_is_polled_anywhere(one, other, until):
    begun = await made(one, background=True)
    assert begun["status"] in ("queued", "in_progress")

    async def ended():
        found = (await other.get(f"/v1/responses/{begun['id']}")).json()
        return found if found["status"] not in ("queued", "in_progress") else None

    found = await until(ended, "it ends")
    checked_response(found)
    assert text_of(found) == text_of(await made(one))
    cancelled = await other.post(f"/v1/responses/{begun['id']}/cancel")
    assert cancelled.json() == found
    streamed = await other.get(f"/v1/responses/{begun['id']}", params={"stream": "true"})
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (400, "not_streamed")


async def test_a_background_stream_is_resumed_anywhere(one, other):
    told = await events(one, background=True)
    for event in told:
        checked_event(event)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    url = f"/v1/responses/{told[0]['response']['id']}?stream=true"
    assert await events(other, "GET", url) == told
    for after in (0, 7, len(told) - 2):
        assert await events(other, "GET", f"{url}&starting_after={after}") == told[after + 1 :]
    assert await events(other, "GET", f"{url}&starting_after={len(told)}") == []


async def test_a_background_stream_goes_on_without_its_client(one, other, until):
    body = BODY | {"stream": True, "background": True, "max_output_tokens": 300}
    async with one.stream("POST", "/v1/responses", json=body) as response:
        first = await anext(response.aiter_lines())
        assert first == "event: response.created"
        listed = response.headers["x-request-id"]
    told = await events(other, "GET", f"/v1/responses/resp_{listed}?stream=true")
    assert told[-1]["type"] == "response.incomplete"
    assert len(told[-1]["response"]["output"][0]["content"][0]["text"]) == 300


async def test_a_background_response_is_cancelled_anywhere(one, other, until, api):
    begun = await made(one, background=True, stream=False, max_output_tokens=3000)
    cancelled = await other.post(f"/v1/responses/{begun['id']}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    assert (await one.get(f"/v1/responses/{begun['id']}")).json()["status"] == "cancelled"
    await until(api.is_idle, "the worker has stopped")


async def test_a_background_response_whose_gateway_is_gone_has_failed(site, until):
    await site.worker("both-1", speedup=1)
    gateway, other = [await site.gateway(num_workers=1) for _ in range(2)]
    async with httpx.AsyncClient(base_url=gateway.url, timeout=180) as client:
        begun = await made(client, background=True, max_output_tokens=3000)
    gateway.process.kill()
    async with httpx.AsyncClient(base_url=other.url, timeout=180) as client:

        async def failed():
            found = (await client.get(f"/v1/responses/{begun['id']}")).json()
            return found if found["status"] == "failed" else None

        assert (await until(failed))["error"]["message"] == "The gateway that ran this response is gone."


async def test_a_gateway_that_stops_says_so_of_its_background_responses(site):
    await site.worker("both-1", speedup=1)
    gateway, other = await site.gateway("--drain-s", "0.1", num_workers=1), await site.gateway(num_workers=1)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=180) as client:
        begun = await made(client, background=True, max_output_tokens=3000)
    gateway.process.popen.terminate()
    assert await gateway.process.ended() == 0
    async with httpx.AsyncClient(base_url=other.url, timeout=180) as client:
        found = (await client.get(f"/v1/responses/{begun['id']}")).json()
    assert found["status"] == "failed"
    assert "stopping" in found["error"]["message"]


async def test_an_emptied_server_keeps_what_comes_after(one, other, nats_url, stack):
    before = await made(one)
    async with client_of(nats_url) as client:
        await call(client, f"STREAM.DELETE.KV_headrace-{stack.site.namespace}-responses")
    assert (await other.get(f"/v1/responses/{before['id']}")).status_code == 404
    after = await made(one)
    assert (await other.get(f"/v1/responses/{after['id']}")).json() == after
    assert (await made(other, previous_response_id=after["id"]))["previous_response_id"] == after["id"]


async def test_without_nats_the_stateless_part_goes_on_and_the_rest_says_what_is_missing(site, tmp_path):
    async with own_nats(tmp_path / "nats", "JS\n") as url:
        site.nats = url
        await site.worker("both-1")
        gateway = await site.gateway(num_workers=1)
    await gateway.process.says("event=nats.disconnected")
    async with httpx.AsyncClient(base_url=gateway.url, timeout=180) as client:
        response = await client.post("/v1/responses", json=BODY)
        assert (response.status_code, response.headers["x-headrace-unstored"]) == (200, "responses_not_kept")
        assert response.json()["store"] is False
        told = (await client.post("/v1/responses", json=BODY | {"stream": True})).content
        assert sse(told)[-1]["type"] == "response.incomplete"
        missing = "needs the store of responses, which is in NATS JetStream"
        name = f"/v1/responses/resp_{'0' * 24}"
        for asked in (
            client.post("/v1/responses", json=BODY | {"background": True}),
            client.post("/v1/responses", json=BODY | {"previous_response_id": "resp_" + "0" * 24}),
            client.get(name),
            client.delete(name),
            client.post(f"{name}/cancel"),
            client.get(f"{name}/input_items"),
        ):
            refused = await asked
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "responses_not_kept")
            assert missing in refused.json()["error"]["message"]


async def test_a_tenant_sees_its_own_responses_alone(site, tmp_path, until):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "a"\nkey = "sk-a"\n[[keys]]\ntenant = "b"\nkey = "sk-b"\n')
    await site.worker("both-1")
    gateway = site.start_gateway("--api-keys-file", str(keys))
    line = await gateway.process.says("event=gateway.listening")
    url = "http://127.0.0.1:" + next(w for w in line.split() if w.startswith("port=")).removeprefix("port=")
    mine, theirs = [
        httpx.AsyncClient(base_url=url, timeout=180, headers={"authorization": f"Bearer sk-{name}"}) for name in "ab"
    ]
    async with mine, theirs:

        async def is_connected():
            return (await mine.get("/health")).json()["workers"] == 1

        await until(is_connected)
        response = await made(mine)
        path = f"/v1/responses/{response['id']}"
        for asked in (
            theirs.get(path),
            theirs.delete(path),
            theirs.post(f"{path}/cancel"),
            theirs.get(f"{path}/input_items"),
        ):
            assert (await asked).status_code == 404
        chained = await theirs.post("/v1/responses", json=BODY | {"previous_response_id": response["id"]})
        assert chained.json()["error"]["code"] == "previous_response_not_found"
        assert (await mine.get(path)).json() == response


async def test_the_openai_client_works_unchanged(stack, until):
    async with openai.AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key="any", max_retries=0) as client:
        extra = {"ignore_eos": True}
        whole = await client.responses.create(model="sim", input="Hi", max_output_tokens=16, extra_body=extra)
        assert len(whole.output_text) == 16
        stream = await client.responses.create(
            model="sim", input="Hi", max_output_tokens=16, stream=True, extra_body=extra
        )
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text
        begun = await client.responses.create(
            model="sim", input="Hi", max_output_tokens=16, background=True, extra_body=extra
        )

        async def ended():
            found = await client.responses.retrieve(begun.id)
            return None if found.status in ("queued", "in_progress") else found

        found = await until(ended)
        assert found.output_text == whole.output_text
        assert (await client.responses.cancel(begun.id)).id == begun.id
        listed = await client.responses.input_items.list(begun.id)
        assert [item.content[0].text for item in listed.data] == ["Hi"]
        assert (await client.responses.input_tokens.count(model="sim", input="Hi")).input_tokens > 0
        await client.responses.delete(begun.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(begun.id)


@pytest.mark.parametrize("name", ["coding_agent.json", "codex.json"])
async def test_a_recorded_request_of_a_coding_agent_replays(one, name):
    recorded = json.loads((RECORDED / name).read_text())
    response = await one.post("/v1/responses", json=recorded | {"max_output_tokens": 8, "ignore_eos": True})
    assert response.status_code == 200, response.text
    ignored = response.headers["x-headrace-ignored"]
    assert all(each in ignored for each in ("client_metadata", "web_search"))
    for event in sse(response.content):
        checked_event(event)


async def test_a_prewarmed_response_says_nothing_and_is_kept(one, other, unique):
    text = unique * 100  # long enough that no difference between workers outweighs computing it again
    asked = {"input": text, "prompt_cache_options": {"prewarm": True}}
    whole = await made(one, **asked)
    checked_response(whole)
    told = await events(one, **asked)
    for event in told:
        checked_event(event)
    assert [event["type"] for event in told] == ["response.created", "response.in_progress", "response.completed"]
    for response in (whole, told[-1]["response"]):
        assert (response["status"], response["output"], response["usage"]["output_tokens"]) == ("completed", [], 0)
        assert (await other.get(f"/v1/responses/{response['id']}")).json() == response
    chat = {"model": "sim", "messages": [said("user", text)], "max_tokens": BODY["max_output_tokens"]}

    async def is_known():  # blocks are told to gateways over NATS
        return (await one.post("/v1/routes", json=chat)).json()["chosen"]["cached_tokens"] > len(text) / 2

    await poll_until(is_known)
    assert (await made(one, input=text))["usage"]["input_tokens_details"]["cached_tokens"] > len(text) / 2
    refused = await one.post("/v1/responses", json=BODY | asked | {"background": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "background")


CONTEXT = 32_768
"""Tokens, and so characters, of the simulated engine."""


async def counted(client, **fields):
    response = await client.post("/v1/responses/input_tokens", json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()["input_tokens"]


def said(role, text):
    return {"role": role, "content": text}


async def test_a_conversation_that_is_too_long_loses_its_first_turns_if_that_is_allowed(one):
    turns = [[said("user", f"{n}: " + "why " * 200), said("assistant", f"{n}: " + "so " * 100)] for n in range(40)]
    items = [item for turn in turns for item in turn] + [said("user", "And the mill?")]
    asked = {"instructions": "Answer in short.", "input": items}
    for refused in ({}, {"truncation": "disabled"}):
        answer = await one.post("/v1/responses", json=BODY | asked | refused)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
    kept = len(items) - 1
    while await counted(one, **asked | {"input": items[kept - 2 :]}) + BODY["max_output_tokens"] <= CONTEXT:
        kept -= 2
    assert 0 < kept < len(items) - 1
    cut = await made(one, **asked, truncation="auto")
    same = await made(one, **asked | {"input": items[kept:]})
    assert cut["truncation"] == "auto"
    assert (text_of(cut), cut["usage"]["input_tokens"]) == (text_of(same), same["usage"]["input_tokens"])
    assert [event["type"] for event in await events(one, **asked, truncation="auto")][-1] == "response.incomplete"


async def test_what_came_before_is_cut_like_what_is_sent(one):
    first = await made(one, input="why " * 5_000)
    going_on = {"previous_response_id": first["id"], "input": "so " * 5_000}
    assert (await one.post("/v1/responses", json=BODY | going_on)).status_code == 400
    cut = await made(one, **going_on, truncation="auto")
    assert cut["usage"]["input_tokens"] == await counted(one, input="so " * 5_000)


async def test_one_turn_that_is_too_long_cannot_be_cut(one):
    answer = await one.post("/v1/responses", json=BODY | {"input": "x" * CONTEXT, "truncation": "auto"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    answer = await one.post("/v1/responses", json=BODY | {"truncation": "some"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "truncation")
