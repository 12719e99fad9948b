"""Who sees what is everybody's: at a port of its own, or with an admin's key."""

import os

import pytest

from tests.integration.conftest import Api

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

KEYS = '[[keys]]\ntenant = "t"\nkey = "sk-plain"\n[[keys]]\ntenant = "o"\nkey = "sk-admin"\nadmin = true\n'
PLAIN, ADMIN = ({"authorization": f"Bearer sk-{name}"} for name in ("plain", "admin"))
OPERATORS = ("/metrics", "/v1/fleet")
OPEN = ("/live", "/health")


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    return ("--api-keys-file", str(path))


async def statuses(api, paths, headers=None):
    return [(await api.get(path, headers=headers)).status_code for path in paths]


async def admin_url(gateway):
    line = await gateway.process.says("event=gateway.admin_listening")
    return "http://127.0.0.1:" + next(word for word in line.split() if word.startswith("at=")).removeprefix("at=")


async def test_with_keys_what_is_everybodys_needs_an_admins(site, reach, keys):
    await site.worker("both-1")
    gateway = await site.gateway(*keys, num_workers=1)
    async with reach(gateway) as api:
        assert await statuses(api, OPEN) == [200, 200]
        assert await statuses(api, OPERATORS) == [401, 401]
        assert await statuses(api, OPERATORS, PLAIN) == [403, 403]
        assert await statuses(api, OPERATORS, ADMIN) == [200, 200]
        served = await api.chat("hello", headers=PLAIN)
        route = f"/v1/routes/{served.headers['x-request-id']}"
        assert await statuses(api, [route], PLAIN) == await statuses(api, [route], ADMIN) == [200]


async def test_the_admin_port_has_all_of_it_and_generates_nothing(site, reach, keys, until):
    await site.worker("both-1")
    gateway = await site.gateway(*keys, "--admin-port", "0", num_workers=1)
    async with reach(gateway) as api, Api(await admin_url(gateway)) as admin:
        assert await statuses(api, OPEN) == await statuses(admin, OPEN) == [200, 200]
        assert await statuses(api, OPERATORS) == await statuses(api, OPERATORS, ADMIN) == [404, 404]
        assert await statuses(admin, OPERATORS) == [200, 200]
        served = await api.chat("hello", headers=PLAIN)
        assert await statuses(admin, [f"/v1/routes/{served.headers['x-request-id']}"]) == [200]
        assert [line["tenant"] for line in (await admin.get("/v1/usage")).json()["data"]] == ["t"]
        assert await admin.metric("headrace_tenant_requests_total", tenant="t") == 1
        for path in ("/v1/chat/completions", "/v1/messages", "/tokenize"):
            refused = await admin.post(path, json=admin.body("hello"), headers=ADMIN)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found"), path
        assert (await admin.get("/v1/models", headers=ADMIN)).status_code == 404


async def test_a_page_of_an_allowed_origin_may_ask_and_read_the_answer(site, reach, keys):
    await site.worker("both-1")
    gateway = await site.gateway(*keys, "--cors-origin", "https://chat.example", num_workers=1)
    page = {"origin": "https://chat.example"}
    async with reach(gateway) as api:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await api._http.options("/v1/chat/completions", headers=page | asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        for answer in (
            preflight,
            await api.chat("hello", headers=page | PLAIN),
            await api.chat("hello", stream=True, headers=page | PLAIN),
            await api.chat("hello", headers=page),
            await api.get("/v1/models", headers=page | PLAIN),
            await api.get("/nowhere", headers=page),
        ):
            assert answer.headers["access-control-allow-origin"] == "https://chat.example", answer
        foreign = await api._http.options("/v1/models", headers=asked | {"origin": "https://evil.example"})
        assert foreign.status_code == 405
        assert "access-control-allow-origin" not in (await api.chat("hello", headers=PLAIN)).headers


async def test_a_page_of_the_console_is_where_its_state_is(site, reach):
    gateway = await site.gateway("--admin-port", "0")
    async with reach(gateway) as api, Api(await admin_url(gateway)) as admin:
        assert await statuses(api, ("/console", "/console/app.js", "/console/state")) == [404] * 3
        assert await statuses(admin, ("/console", "/console/app.js")) == [200, 200]
        async with admin._http.stream("GET", "/console/state") as state:
            assert state.status_code == 200
            lines = (line async for line in state.aiter_lines() if line.startswith("data: "))
            assert '"has_playground":false' in await anext(lines)


async def test_an_admin_port_that_others_reach_asks_for_an_admins_key(site, keys):
    gateway = await site.gateway(*keys, "--admin-port", "0", "--admin-host", "0.0.0.0")
    async with Api(await admin_url(gateway)) as admin:
        assert await statuses(admin, OPEN) == [503 if path == "/health" else 200 for path in OPEN]
        for path in (*OPERATORS, "/v1/usage", "/v1/routes"):
            assert [await statuses(admin, [path], key) for key in (None, PLAIN, ADMIN)] == [[401], [403], [200]], path


async def test_an_admin_port_without_keys_is_for_this_machine_alone(site):
    process = site.start_gateway("--admin-port", "0", "--admin-host", "0.0.0.0").process
    assert await process.ended() == 2
    assert process.said("--admin-host 0.0.0.0 is an address that others reach")


async def test_commands_find_the_admin_port(site, reach, keys):
    await site.worker("both-1")
    gateway = await site.gateway(*keys, "--admin-port", "0", num_workers=1)
    admin = await admin_url(gateway)
    async with reach(gateway) as api:
        request = (await api.chat("hello", headers=PLAIN)).headers["x-request-id"]
    for arguments, told in (
        (("top", "--every-s", "0.2"), "both-1"),
        (("trace",), request),
        (("trace", request), "ok after"),
        (("doctor", *site.flags), "connected to 1 of 1 workers"),
    ):
        command = site.start("command", ["app.cli", *arguments, "--url", admin])
        assert await command.ended() == 0, command.log.read_text()
        assert command.said(told)
    for arguments, status in ((("top",), 2), (("doctor", *site.flags), 1)):
        command = site.start("command", ["app.cli", *arguments, "--url", gateway.url])
        assert await command.ended() == status
        assert command.said("at this gateway's --admin-port; commands find it with --url")


@pytest.mark.parametrize(("key", "statuses_"), [("sk-admin", (0, 0)), ("sk-plain", (1, 2)), ("", (1, 2))])
async def test_commands_show_an_admins_key(site, keys, key, statuses_):
    await site.worker("both-1")
    gateway = await site.gateway(*keys, num_workers=1)
    shown = os.environ | ({"HEADRACE_API_KEY": key} if key else {})
    commands = [
        site.start("command", ["app.cli", *arguments, "--url", gateway.url], shown)
        for arguments in (("doctor", *site.flags), ("top", "--every-s", "0.2"))
    ]
    assert [await command.ended() for command in commands] == list(statuses_)
    if key != "sk-admin":
        assert commands[0].said("show an admin's --api-key")
        assert all(command.said("made with --admin" if key else "No API key was given") for command in commands)
