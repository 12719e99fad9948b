"""A short share of `make fuzz` over HTTP: whatever is sent, the answer is one that the API's description has."""

import asyncio

import pytest

from tests.fuzz import bodies, routes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


async def test_every_answer_to_a_generated_request_is_described(stack):
    report = await asyncio.to_thread(routes.run, stack.gateway.url, 64, 1, "sim")
    assert report.failures == []
    assert report.num_cases >= 64
    assert report.statuses[200]
    assert report.statuses[400]


async def test_every_answer_to_a_hostile_body_is_described(stack, tmp_path):
    report = await bodies.over_http(400, 1, tmp_path, stack.gateway.url)
    assert report.failures == []
    assert report.outcomes["200"]
    assert report.outcomes["400"]
