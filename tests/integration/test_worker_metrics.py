"""What a worker tells Prometheus of requests that really came."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.conftest import PATIENCE_S

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


async def port_of(worker):
    line = await worker.says("event=metrics.listening")
    return int(next(word for word in line.split() if word.startswith("port=")).removeprefix("port="))


async def scraped(worker):
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        answer = await client.get(f"http://127.0.0.1:{await port_of(worker)}/metrics")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value for each in families for sample in each.samples
    }


async def test_each_of_two_workers_counts_its_part_of_a_request(site, reach, unique):
    prefill = await site.worker("prefill-1", "--metrics-port", "0")
    decode = await site.worker("decode-1", "--metrics-port", "0")
    gateway = await site.gateway(num_workers=2)
    async with reach(gateway) as api:
        answer = await api.chat(unique, headers={"x-headrace-handover": "always"}, max_tokens=9)
        usage = answer.json()["usage"]
    given, taken = await scraped(prefill), await scraped(decode)
    key = ("0", "sim")
    assert given["vllm:prompt_tokens_total", *key] == usage["prompt_tokens"]
    assert taken["vllm:generation_tokens_total", *key] == 9
    assert taken["vllm:request_success_total", "0", "length", "sim"] == 1
    assert taken["headrace_worker_handover_bytes_total", *key] > 0
    assert (given["headrace_worker_legs_total", "prefill"], taken["headrace_worker_legs_total", "decode"]) == (1, 1)
    assert given["vllm:time_to_first_token_seconds_count", *key] == 1
    assert given["headrace_worker_role", "prefill", "prefill-1"] == 1
    assert (taken["vllm:num_requests_running", *key], taken["vllm:num_requests_waiting", *key]) == (0, 0)
    assert 0 <= taken["vllm:kv_cache_usage_perc", *key] <= 1


@pytest.mark.parametrize(("flags", "status"), [((), 401), (("--insecure",), 200)])
async def test_where_others_reach_them_a_start_must_say_that_they_may_read_them(site, tmp_path, flags, status):
    (tmp_path / "token").write_text("the fleet's own token")
    public = ("--host", "0.0.0.0", "--advertise-host", "127.0.0.1", "--stream-token-file", str(tmp_path / "token"))
    worker = await site.worker("both-1", "--metrics-port", "0", *public, *flags)
    url = f"http://127.0.0.1:{await port_of(worker)}"
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        assert (await client.get("/metrics")).status_code == status
        assert (await client.get("/live")).status_code == 200


async def test_a_taken_port_stops_the_start(site):
    first = await site.worker("prefill-1", "--metrics-port", "0")
    second = site.start_worker("prefill-2", "--metrics-port", str(await port_of(first)))
    assert await second.ended() == 2
    assert second.said("--metrics-port is")
