"""Routing policies, one per file; each cites where its rule comes from."""

from collections.abc import Mapping
from importlib import import_module
from typing import Final, cast

from router.policy import Policy

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
    "llmd_predicted": "router.policies.llmd_predicted:LlmdPredicted",
    "mooncake": "router.policies.mooncake:Mooncake",
    "ray_prefix": "router.policies.ray_prefix:RayPrefix",
    "aibrix": "router.policies.aibrix:Aibrix",
}
"""Name → `module:Class`, as `--policy` also takes it from users."""


def load_policy(name: str) -> Policy:
    """The policy with this name, or a user's own class, given as `package.module:Class` and built without arguments.

    Raises:  ValueError that says what is wrong with `name` and what is allowed.
    """
    target = POLICIES.get(name, name)
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"policy is {name!r} and must be package.module:Class or one of {', '.join(sorted(POLICIES))}")
    try:
        policy = getattr(import_module(module), attribute)()
        is_one = callable(getattr(policy, "choose", None)) and hasattr(policy, "name")
        if is_one:
            policy.name.encode()
    except Exception as exc:  # a plug-in's code runs here and may raise anything
        raise ValueError(f"policy {name!r} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    if not is_one:
        raise ValueError(f"policy {name!r} has no method `choose` and text `name` (see router/policy.py)")
    return cast(Policy, policy)
