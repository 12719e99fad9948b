import asyncio
import dataclasses
import json

import httpx
import pytest

from app.auth import ApiKeys
from app.console.live import MOST_WATCHERS
from app.main import create_app
from tests.raw_http import read_head, until


@pytest.fixture
def opened(served):
    """Asks a gateway for its stream, over a connection."""

    async def start(gateway, *headers):
        reader, writer = await asyncio.open_connection(*await served(gateway))
        lines = ["GET /console/state HTTP/1.1", "Host: x", *headers, "", ""]
        writer.write("\r\n".join(lines).encode())
        status, told = await read_head(reader)
        return reader, writer, status, told

    return start


async def test_the_page_comes_with_its_policy(client):
    found = await client.get("/console")
    assert (found.status_code, found.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "script-src 'self'" in found.headers["content-security-policy"]
    assert found.headers["x-content-type-options"] == "nosniff"
    script = await client.get("/console/app.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"


async def test_a_browser_that_has_the_newest_is_told_so(client):
    found = await client.get("/console/console.css")
    again = await client.get("/console/console.css", headers={"if-none-match": found.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", found.headers["etag"])


@pytest.mark.parametrize("name", ["none.js", "../live.py", "%2e%2e/live.py", "vendor/LICENSE", "", "static/app.js"])
async def test_nothing_else_is_served(client, name):
    assert (await client.get(f"/console/{name}")).status_code == 404


@pytest.mark.parametrize("path", ["/console", "/console/app.js", "/console/state"])
async def test_turned_off_there_is_nothing(gateway, path):
    transport = httpx.ASGITransport(create_app(dataclasses.replace(gateway, live=None)))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        assert (await client.get(path)).status_code == 404


async def test_the_stream_tells_the_state_and_ends_with_its_watcher(gateway, fleet, opened):
    reader, writer, status, headers = await opened(gateway)
    assert (status, headers["content-type"]) == ("200", "text/event-stream")
    size = int(await reader.readline(), 16)
    kind, _, data = (await reader.readexactly(size)).decode().strip().split("\n")
    assert kind == "event: state"
    assert len(json.loads(data.removeprefix("data: "))["workers"]) == 4
    assert gateway.live.num_watchers == 1
    writer.close()
    await until(lambda: gateway.live.num_watchers == 0)


async def test_the_stream_needs_a_key_where_there_are_keys(gateway, opened, tmp_path):
    (tmp_path / "keys.toml").write_text('[[keys]]\ntenant = "t"\nkey = "sk"\n')
    gateway = dataclasses.replace(gateway, keys=ApiKeys(tmp_path / "keys.toml"))
    _, writer, status, _ = await opened(gateway)
    assert (status, gateway.live.num_watchers) == ("401", 0)
    writer.close()


@pytest.fixture
def keyed(gateway, tmp_path):
    """The same gateway with a key of an admin, and one of somebody else."""
    tables = ('tenant = "operator"\nkey = "sk-admin"\nadmin = true', 'tenant = "t"\nkey = "sk-t"')
    (tmp_path / "keys.toml").write_text("\n".join(f"[[keys]]\n{table}" for table in tables))
    return dataclasses.replace(gateway, keys=ApiKeys(tmp_path / "keys.toml"))


@pytest.mark.parametrize(("key", "status"), [("sk-admin", "200"), ("sk-t", "403")])
async def test_the_stream_tells_of_all_tenants_and_so_is_an_admins(keyed, opened, key, status):
    _, writer, answered, _ = await opened(keyed, f"Authorization: Bearer {key}")
    assert answered == status
    writer.close()


async def test_an_admin_sees_the_requests_of_all_and_others_their_own(keyed, fleet):
    fleet.end_request(ago_s=0.0)
    [found] = keyed.router.recent(None, 1)
    transport = httpx.ASGITransport(create_app(keyed))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:

        async def told(key, path):
            return await client.get(path, headers={"authorization": f"Bearer {key}"})

        assert [each["request"] for each in (await told("sk-admin", "/v1/routes")).json()["data"]] == [found.request]
        assert (await told("sk-t", "/v1/routes")).json()["data"] == []
        assert (await told("sk-admin", f"/v1/routes/{found.request}")).status_code == 200
        assert (await told("sk-t", f"/v1/routes/{found.request}")).status_code == 404


async def test_one_watcher_too_many_is_told_when_to_come_again(gateway, opened):
    gateway.live._num_watchers = MOST_WATCHERS
    reader, writer, status, headers = await opened(gateway)
    assert (status, headers["retry-after"]) == ("503", "5")
    body = json.loads(await reader.readexactly(int(headers["content-length"])))
    assert body["error"]["code"] == "too_many_watchers"
    writer.close()
    gateway.live._num_watchers = 0
