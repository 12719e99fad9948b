"""What keys have used: exact over two gateways, and told to those whose it is."""

import csv
import io

import pytest

from tests.quotas import run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


async def test_usage_is_what_the_workers_computed_and_no_key_exceeds_a_limit(site, reach):
    outcome = await run(site, 300)
    assert outcome.num_cancelled > 30
    assert any(statuses[429] for statuses in outcome.statuses.values())
    outcome.check()
    async with reach(outcome.reader) as api:
        own = {"authorization": "Bearer sk-hr-key_0"}
        told = (await api.get("/v1/usage", headers=own)).json()
        assert told["data"] == [line for line in outcome.used if line["key"] == "key_0"] != []
        assert (await api.get("/v1/usage?key=key_1", headers=own)).json()["data"] == told["data"]
        admin = {"authorization": "Bearer sk-hr-key_admin"}
        assert {line["key"] for line in (await api.get("/v1/usage?key=key_1", headers=admin)).json()["data"]} == {
            "key_1"
        }
        table = await api.get("/v1/usage?format=csv", headers=own)
        assert table.headers["content-type"].startswith("text/csv")
        assert list(csv.DictReader(io.StringIO(table.text))) == [
            {name: str(value) for name, value in line.items()} for line in told["data"]
        ]
        yesterday = await api.get("/v1/usage?start=2020-01-01&end=2020-01-31", headers=own)
        assert yesterday.json() == {"object": "list", "start": "2020-01-01", "end": "2020-01-31", "data": []}
        for query in ("start=tomorrow", "start=2020-01-01", "end=2020-01-01&start=2020-01-02", "format=xml"):
            assert (await api.get(f"/v1/usage?{query}", headers=own)).status_code == 400, query
        assert (await api.get("/v1/usage")).status_code == 401
        seen = await api.metric("headrace_tenant_requests_total", headers=admin)
        assert seen == 0, "what this gateway has seen itself"
