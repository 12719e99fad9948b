"""What a client may ask for in headers."""

import json

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

LONG = "The headrace carries the water to the wheel. " * 40


async def chat(api, prompt, **headers):
    named = {f"x-headrace-{name}": value for name, value in headers.items()}
    return await api.post("/v1/chat/completions", json=api.body(prompt), headers=named)


def workers(response):
    assert response.status_code == 200, response.text
    return response.headers["x-headrace-prefill"], response.headers["x-headrace-decode"]


async def test_a_wish_for_a_handover_is_honoured_whatever_the_policy(api, pairing, alone, unique):
    right = await alone.text(unique)
    for asked in (api, pairing):
        always = await chat(asked, unique, handover="always")
        prefill, decode = workers(always)
        assert (prefill, decode[:7]) == ("prefill-1", "decode-")
        never = await chat(asked, unique[::-1] + LONG, handover="never")
        prefill, decode = workers(never)
        assert prefill == decode
        assert always.json()["choices"][0]["message"]["content"] == right
        explanation = (await asked.get(f"/v1/routes/{always.headers['x-request-id']}")).json()
        assert explanation["handover"] == "always"
        assert all(option["prefill"] == "prefill-1" for option in explanation["candidates"])


async def test_a_preview_honours_it_as_well(api, unique):
    for preference, is_pair in (("always", True), ("never", False)):
        preview = await api.post("/v1/routes", json=api.body(unique), headers={"x-headrace-handover": preference})
        assert preview.json()["handover"] == preference
        assert (preview.json()["chosen"]["prefill"] is not None) == is_pair


async def test_a_fleet_that_cannot_hand_over_says_so(alone, unique):
    refused = await chat(alone, unique, handover="always")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "no_pair"
    assert "hand a KV cache" in refused.json()["error"]["message"]
    workers(await chat(alone, unique, handover="never"))


async def test_an_unknown_wish_is_refused_by_name_value_and_what_is_allowed(api, unique):
    refused = await chat(api, unique, handover="perhaps")
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "x-headrace-handover"
    assert error["message"] == "x-headrace-handover is 'perhaps'; auto, always, never are possible"


async def test_the_chosen_route_comes_in_a_header_when_asked_for(api, unique):
    assert "x-headrace-route" not in (await chat(api, unique)).headers
    response = await chat(api, unique, explain="1", handover="always")
    route = json.loads(response.headers["x-headrace-route"])
    assert (route["prefill"], route["decode"]) == workers(response)
    assert route["total_s"] >= route["prefill_s"] + route["handover_s"] > 0
    assert {"cached_tokens", "queue_s", "inflicted_s", "held_s"} < set(route)
    assert route["candidates"] == 2
    assert len(response.headers["x-headrace-route"]) < 2048
