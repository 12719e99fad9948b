"""Routing policies, one per file; each cites where its rule comes from."""

from collections.abc import Mapping
from typing import Final

POLICIES: Final[Mapping[str, str]] = {
    "headrace": "router.policies.headrace:Headrace",
    "round_robin": "router.policies.round_robin:RoundRobin",
    "random": "router.policies.random_choice:RandomChoice",
    "power_of_two": "router.policies.power_of_two:PowerOfTwo",
    "least_loaded": "router.policies.least_loaded:LeastLoaded",
    "dynamo": "router.policies.dynamo:Dynamo",
    "infera": "router.policies.infera:Infera",
    "sglang_cache_aware": "router.policies.sglang_cache_aware:SglangCacheAware",
    "llmd": "router.policies.llmd:Llmd",
    "mooncake": "router.policies.mooncake:Mooncake",
    "ray_prefix": "router.policies.ray_prefix:RayPrefix",
    "aibrix": "router.policies.aibrix:Aibrix",
}
"""Name → `module:Class`, as `--policy` also takes it from users."""
