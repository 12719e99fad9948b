"""What a worker tells Prometheus of requests that really came."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


async def port_of(worker):
    line = await worker.says("event=metrics.listening")
    return int(next(word for word in line.split() if word.startswith("port=")).removeprefix("port="))


async def scraped(worker):
    async with httpx.AsyncClient() as client:
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


async def test_a_taken_port_stops_the_start(site):
    first = await site.worker("prefill-1", "--metrics-port", "0")
    second = site.start_worker("prefill-2", "--metrics-port", str(await port_of(first)))
    assert await second.ended() == 2
    assert second.said("--metrics-port is")
