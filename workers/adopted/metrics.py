"""What is read of a server's `GET /metrics`."""

import re
from dataclasses import dataclass

_SAMPLE = re.compile(r"^(vllm:[a-z_]+)(?:\{(.*)\})? ([0-9.eE+-]+)$", re.MULTILINE)
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """How busy a server is, whoever keeps it busy. usage: share of its KV blocks in use, 0.0 to 1.0."""

    num_running: int = 0
    num_waiting: int = 0
    usage: float = 0.0


def read_load(exposition: str) -> ServerLoad:
    """Sums over what one server tells; what it does not tell is 0."""
    found = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0, "vllm:kv_cache_usage_perc": 0.0}
    for name, _, value in _SAMPLE.findall(exposition):
        if name in found:
            found[name] += float(value)
    running, waiting, usage = found.values()
    return ServerLoad(int(running), int(waiting), min(max(usage, 0.0), 1.0))


def read_cache_config(exposition: str) -> dict[str, str]:
    """vLLM's own description of its KV cache; empty if it tells none."""
    for name, labels, _ in _SAMPLE.findall(exposition):
        if name == "vllm:cache_config_info":
            return dict(_LABEL.findall(labels))
    return {}
