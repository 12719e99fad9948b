from planes.wire.frames import DecodeLeg, FinishReason, LocalLeg, PrefillLeg, Usage
from planes.wire.messages import HandoverMode, Role, WorkerId
from workers.engine.base import EngineLoad
from workers.metrics import WorkerMetrics

LABELS = 'engine="0",model_name="sim"'


def metrics(load=None, role=Role.DECODE):
    return WorkerMetrics(
        WorkerId("w"), "sim", num_blocks=100, load=lambda: load or EngineLoad(free_blocks=100), role=lambda: role
    )


def values(made):
    lines = [line.rsplit(" ", 1) for line in made.exposition().decode().splitlines() if not line.startswith("#")]
    return {sorted_labels(name): float(value) for name, value in lines}


def sorted_labels(name):
    family, _, labels = name.partition("{")
    return f"{family}{{{','.join(sorted(labels.rstrip('}').split(',')))}}}" if labels else family


def test_autoscalers_find_the_engine_s_load_under_vllm_s_names():
    found = values(metrics(EngineLoad(num_running=3, num_waiting=2, free_blocks=25)))
    assert found[f"vllm:num_requests_running{{{LABELS}}}"] == 3
    assert found[f"vllm:num_requests_waiting{{{LABELS}}}"] == 2
    assert found[f"vllm:kv_cache_usage_perc{{{LABELS}}}"] == 0.75
    assert found['headrace_worker_role{role="decode",worker="w"}'] == 1
    assert found['headrace_worker_role{role="prefill",worker="w"}'] == 0


def test_a_request_served_alone_counts_with_all_its_parts():
    made = metrics()
    usage = Usage(100, 11, 40, queue_s=0.25, prefill_s=0.5, decode_s=1.0)
    made.done(LocalLeg(), usage, FinishReason.STOP)
    found = values(made)
    assert found[f"vllm:time_to_first_token_seconds_sum{{{LABELS}}}"] == 0.75
    assert found[f"vllm:inter_token_latency_seconds_sum{{{LABELS}}}"] == 0.1
    assert found[f"vllm:e2e_request_latency_seconds_sum{{{LABELS}}}"] == 1.75
    assert found[f"vllm:prompt_tokens_total{{{LABELS}}}"] == 100
    assert found[f"vllm:prefix_cache_hits_total{{{LABELS}}}"] == 40
    assert found[f"vllm:generation_tokens_total{{{LABELS}}}"] == 11
    assert found['vllm:request_success_total{engine="0",finished_reason="stop",model_name="sim"}'] == 1
    assert found[f"headrace_worker_handover_bytes_total{{{LABELS}}}"] == 0


def test_a_request_handed_over_counts_its_prompt_where_it_was_computed_and_its_success_where_it_ended():
    prefill, decode = metrics(), metrics()
    prefill.done(PrefillLeg(HandoverMode.PULL), Usage(100, 1, 40, prefill_s=0.5), FinishReason.LENGTH)
    decode.done(DecodeLeg(), Usage(100, 11, 40, handover_s=0.5, handover_bytes=7, decode_s=1.0), FinishReason.LENGTH)
    given, taken = values(prefill), values(decode)
    assert [each[f"vllm:prompt_tokens_total{{{LABELS}}}"] for each in (given, taken)] == [100, 0]
    assert [each[f"vllm:e2e_request_latency_seconds_count{{{LABELS}}}"] for each in (given, taken)] == [0, 1]
    assert not any(name.startswith("vllm:request_success_total") for name in given)
    assert taken[f"headrace_worker_handover_bytes_total{{{LABELS}}}"] == 7
    assert taken[f"vllm:time_to_first_token_seconds_sum{{{LABELS}}}"] == 0.5
    assert (given['headrace_worker_legs_total{leg="prefill"}'], taken['headrace_worker_legs_total{leg="decode"}']) == (
        1,
        1,
    )


def test_failures_are_counted_by_why():
    made = metrics(role=None)
    made.failed("worker_busy")
    found = values(made)
    assert found['headrace_worker_failed_legs_total{code="worker_busy"}'] == 1
    assert found['headrace_worker_role{role="decode",worker="w"}'] == 0, "it is leaving"
