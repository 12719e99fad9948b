"""What a decision of the router costs: CPU of submitting, dispatching and releasing one short request. In `make bench`.

    python -m loadtest.decisions

Half of the workers prefill, half decode; all are idle and report their steps. Each decision is timed by itself, and the
lower quartile is told: whatever else the machine does moves it little.
"""

import random
import time
from dataclasses import dataclass

import numpy as np
from cyclopts import App

from planes.wire.messages import (
    EngineFacts,
    HandoverEndpoint,
    HandoverMode,
    LoadReport,
    Registration,
    RequestId,
    Role,
    StepSample,
    WorkerId,
    WorkerState,
)
from router.policies import load_policy
from router.request import Observed, RoutableRequest
from router.router import Router
from router.settings import RouterSettings

POLICIES = ("headrace", "least_loaded")
WORKERS = (2, 4, 8, 16, 256)
_PAUSE_S = 0.05  # between two requests, on the router's clock
_FACTS = EngineFacts(
    block_size=16,
    num_blocks=10_000,
    context_length=100_000,
    max_batch=256,
    max_step_tokens=8192,
    bytes_per_block=1 << 17,
    vocab_size=256,
)
app = App(help=__doc__, version_flags=[])


@dataclass(frozen=True, slots=True)
class DecisionCost:
    """One policy on one fleet. cpu_us: of a decision, microseconds."""

    policy: str
    num_workers: int
    has_slos: bool
    cpu_us: float


def measure(policy: str, num_workers: int, *, num_decisions: int, has_slos: bool = False) -> DecisionCost:
    """num_workers: 2 or more, even.  num_decisions: 4 or more."""
    settings = RouterSettings(slo_ttft_s=5.0, slo_itl_s=0.05) if has_slos else RouterSettings()
    router = Router(settings, load_policy(policy), rng=random.Random(1))
    for number in range(num_workers):
        _join(router, f"w{number}", Role.PREFILL if number % 2 else Role.DECODE)
    blocks = np.arange(12, dtype=np.uint64)
    observed = Observed(ttft_s=0.01, queue_s=0.0, prefill_s=0.01, cached_tokens=0, completion_tokens=10)
    now, spent = 1.0, []
    for number in range(num_decisions):
        now += _PAUSE_S
        request = RoutableRequest(RequestId(str(number)), "m", blocks.copy(), 200, 10, now + 60)
        before = time.process_time()
        router.submit(request, now=now)
        router.dispatch(now=now)
        router.prefilled(request.request, now=now)
        router.release(request.request, observed, now=now)
        spent.append(time.process_time() - before)
    return DecisionCost(policy, num_workers, has_slos, sorted(spent)[len(spent) // 4] * 1e6)


def _join(router: Router, name: str, role: Role) -> None:
    worker = WorkerId(name)
    endpoint = HandoverEndpoint(HandoverMode.PULL, name, "127.0.0.1", 5600)
    router.worker_up(Registration(worker, 1, role, "m", "127.0.0.1:1", "sim", _FACTS, "", handover=endpoint))
    step = StepSample(duration_s=0.02, prefill_tokens=200, prefill_pairs=20_000, batch=0, kv_tokens=0)
    router.apply_load(LoadReport(worker, 1, WorkerState.READY, 0, 0, 0, 10_000, 0, 0, 0, 0, [step]), now=1.0)


@app.default
def main() -> None:
    """Measure all, and print as they end."""
    measure_all(num_decisions=4000)


def measure_all(num_decisions: int) -> list[DecisionCost]:
    """Print as they end.  num_decisions: of each case; large fleets get a tenth."""
    costs = []
    for has_slos in (False, True):
        print(f"CPU µs per decision, {'with' if has_slos else 'without'} SLOs:", flush=True)
        for num_workers in WORKERS:
            decisions = num_decisions if num_workers < 100 else num_decisions // 10
            row = [measure(policy, num_workers, num_decisions=decisions, has_slos=has_slos) for policy in POLICIES]
            print(f"  {num_workers:3} workers: " + ", ".join(f"{c.policy} {c.cpu_us:.0f}" for c in row), flush=True)
            costs += row
    return costs


if __name__ == "__main__":
    app()
