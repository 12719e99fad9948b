"""Regimes in which a rule was found behind outside the grid; each keeps its name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import msgspec

from loadtest.grid.loads import Setup
from loadtest.simulator.scenario import Scenario, engine_facts
from loadtest.slo import Slo
from loadtest.workloads import Session, Turn, Workload, load, segment_names
from planes.wire.messages import LatencyPrior

_BLOCK_SIZE: Final = 16


def _clients(name: str, num_clients: int, num_requests: int, prompt_tokens: int, answer: int) -> Workload:
    """Nothing is shared."""
    names = [segment_names([(number, prompt_tokens)], _BLOCK_SIZE) for number in range(num_requests)]
    sessions = tuple(Session(0.0, (Turn(0.0, prompt_tokens, answer, each),)) for each in names)
    return Workload(name, _BLOCK_SIZE, sessions, num_clients)


def _fast(name: str, seed: int, prefill: float, step_s: float, slo: Slo, workload: Workload) -> Setup:
    """Two workers that do both, as a simulated worker's `--sim-prefill-tokens-per-s` and `--sim-step-s` make them."""
    facts = msgspec.structs.replace(
        engine_facts(block_size=_BLOCK_SIZE, num_blocks=65_536, link_gbps=100),
        latency=LatencyPrior(prefill_per_token_s=1 / prefill, step_fixed_s=step_s),
        max_batch=2048,
        max_step_tokens=8192,
    )
    scenario = Scenario("", num_prefill=0, num_decode=0, num_both=2, facts=facts, seed=seed)
    return Setup(name, name, {}, scenario, workload, slo)


def _fast_both_170(seed: int) -> Setup:
    """About an H100 with an 8B model."""
    name = "fast-both-170"
    workload = _clients(name, 256, 2048, prompt_tokens=170, answer=1)
    return _fast(name, seed, 60_000, 0.01, Slo(ttft_s=0.5), workload)


def _fast_both_nearly_free(seed: int) -> Setup:
    name = "fast-both-nearly-free"
    workload = _clients(name, 256, 4096, prompt_tokens=170, answer=1)
    return _fast(name, seed, 1e7, 0.005, Slo(ttft_s=0.5), workload)


def _burst_3000(seed: int) -> Setup:
    name = "burst-3000"
    workload = _clients(name, 3000, 3000, prompt_tokens=100, answer=100)
    return _fast(name, seed, 60_000, 0.05, Slo(ttft_s=5.0, tpot_s=0.2), workload)


def _code(rate: int, seed: int) -> Setup:
    facts = engine_facts(block_size=512, num_blocks=1000, link_gbps=100)
    scenario = Scenario("", num_prefill=8, num_decode=4, num_both=0, facts=facts, seed=seed)
    workload = load("code", block_size=512, seed=seed).scaled(rate)
    name = f"code-x{rate}"
    return Setup(name, name, {}, scenario, workload, Slo())


NAMED: Final[Mapping[str, Callable[[int], Setup]]] = {
    "fast-both-170": _fast_both_170,
    "fast-both-nearly-free": _fast_both_nearly_free,
    "burst-3000": _burst_3000,
    **{f"code-x{rate}": partial(_code, rate) for rate in (1, 2, 3)},
}
"""Name → from a seed, what it is."""
