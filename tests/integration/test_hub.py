"""A worker serves a model by its id at the hub, out of the hub's cache; its gateway needs no cache."""

import os

import pytest

from tests.hub_cache import write_hub_cache
from workers.settings import SIM_MODEL

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


async def test_a_cached_model_is_served_without_a_network(site, reach, tmp_path):
    write_hub_cache(tmp_path / "hf", "org/tiny", SIM_MODEL)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    flags = ["--role", "both", "--worker-id", "both-1", "--engine", "sim", "--model", "org/tiny", *site.flags]
    site.start("both-1", ["workers", *flags], environment)
    async with reach(await site.gateway(num_workers=1)) as api:
        assert [model["id"] for model in (await api.get("/v1/models")).json()["data"]] == ["org/tiny"]
        assert await api.text("Tell me something about mills.", model="org/tiny")
