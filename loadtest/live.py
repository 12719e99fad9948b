"""Measurements on live fleets.

    python -m loadtest.live agree     # the simulator against a live simulated fleet, and predictions against outcomes
    python -m loadtest.live planned   # `headrace plan` against the fleet that it plans, live and simulated
    python -m loadtest.live closed    # many clients at once on fast simulated engines, by policy
    python -m loadtest.live mix       # real vLLM on two cores: long prompts among chats, disaggregated and plain

Arrivals are drawn from a seed before the run and do not wait for answers (open loop); variants are compared in one run,
on one machine, alternating, with the same arrivals.
"""

import asyncio
import json
import math
import os
import random
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import uvloop
from cyclopts import App, Parameter

from loadtest.client import Client, Sample
from loadtest.closed_loop import Row, Shape, Target, closed_loop
from loadtest.like import read_fleet
from loadtest.plan import sample
from loadtest.plan.__main__ import plan as make_plan
from loadtest.plan.report import table
from loadtest.plan.trial import P99, WARM_UP, Bench, Fleet
from loadtest.processes import allow_files
from loadtest.report import quantile
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.simulation import Simulation
from loadtest.slo import Slo
from loadtest.stack import Stack, stack
from loadtest.workloads import Turn, Workload, load
from loadtest.written import check_file
from planes.wire.messages import EngineFacts

app = App(help=__doc__, version_flags=[])
_Out = Annotated[Path | None, Parameter(name="--json", help="Write everything there too.")]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of an open loop. kind: `chat` or `long`, or whatever the result is split by."""

    at_s: float
    kind: str
    path: str
    body: dict[str, Any]


async def replay(running: Stack, arrivals: Sequence[Arrival], headers: dict[str, str] | None = None) -> list[Sample]:
    """Send every request at its instant, whatever became of those before. Samples in the order of `arrivals`."""
    return await replay_in_turn([running.port], arrivals, headers)


async def replay_in_turn(
    ports: Sequence[int], arrivals: Sequence[Arrival], headers: dict[str, str] | None = None
) -> list[Sample]:
    """The same, to one server after the other."""
    started_at = time.monotonic()

    async def one(port: int, arrival: Arrival) -> Sample:
        await asyncio.sleep(started_at + arrival.at_s - time.monotonic())
        client = Client("127.0.0.1", port)
        try:
            return await client.post(arrival.path, arrival.body, headers)
        finally:
            client.close()

    return await asyncio.gather(*(one(ports[n % len(ports)], arrival) for n, arrival in enumerate(arrivals)))


def ask(running: Stack, path: str) -> Any:
    """A JSON answer of the gateway."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}{path}") as answer:
        return json.load(answer)


# --- the simulator against a live fleet ----------------------------------------------------------------------------


def completion_of(turn: Turn, model: str, facts: EngineFacts, rng: random.Random) -> dict[str, Any]:
    """A completion whose prompt has the turn's blocks in common with others, and nothing else."""
    held = [np.random.default_rng(int(name)).integers(97, 123, facts.block_size) for name in turn.blocks]
    tokens = [int(token) for block in held for token in block]
    tokens += [rng.randrange(97, 123) for _ in range(turn.prompt_tokens - len(tokens))]
    return {
        "model": model,
        "prompt": tokens,
        "max_tokens": turn.completion_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@app.command
def agree(
    *,
    trace: str = "conversation",
    rate: float = 0.25,
    limit: int = 120,
    prefill: int = 2,
    decode: int = 2,
    seed: int = 0,
    out: _Out = None,
) -> None:
    """One small trace through a live simulated fleet and through the simulator, with the same policy and facts."""
    check_file("json", out)
    _write(uvloop.run(_agree(trace, rate, limit, prefill, decode, seed)), out)


async def _agree(trace: str, rate: float, limit: int, prefill: int, decode: int, seed: int) -> dict[str, Any]:
    flags = ("--engine", "sim", "--prefill", str(prefill), "--decode", str(decode))
    print("starting the live fleet …", flush=True)
    async with stack(*flags, environment=_ENGINE) as running:
        listed = (await asyncio.to_thread(ask, running, "/v1/fleet"))["workers"]
        facts = msgspec.convert(listed[0]["facts"], EngineFacts)
        workload = load(trace, block_size=facts.block_size, seed=seed).scaled(rate).limited(limit)
        turns = [(session.start_s, session.turns[0]) for session in workload.sessions]
        turns = [(at, turn) for at, turn in turns if turn.prompt_tokens + turn.completion_tokens < facts.context_length]
        rng = random.Random(seed)
        arrivals = [
            Arrival(at, "completion", "/v1/completions", completion_of(turn, running.model, facts, rng))
            for at, turn in turns
        ]
        print(f"{len(arrivals)} requests within {turns[-1][0]:.0f} s …", flush=True)
        samples = await replay(running, arrivals)
        explained = [
            await asyncio.to_thread(ask, running, f"/v1/routes/{sample.headers['x-request-id']}")
            for sample in samples
            if not sample.error
        ]
    simulated = _simulate(workload, facts, prefill, decode, seed)
    live = _quantiles([sample.ttft_s for sample in samples if not sample.error])
    errors = [
        abs(_ttft(entry["chosen"]) + entry["held_s"] - entry["observed"]["ttft_s"]) / entry["observed"]["ttft_s"]
        for entry in explained
    ]
    difference = live["p50"] / simulated["p50"] - 1
    print(f"TTFT s, live:      {_line(live)}")
    print(f"TTFT s, simulated: {_line(simulated)}")
    print(f"p50 differs by {difference:+.1%} (aim: within 15 %)")
    print(f"predicted against observed TTFT, median error: {statistics.median(errors):.1%} (aim: at most 20 %)")
    return {
        "live": live,
        "simulated": simulated,
        "p50_difference": difference,
        "median_prediction_error": statistics.median(errors),
        "failed": sum(bool(sample.error) for sample in samples),
    }


def _simulate(workload: Workload, facts: EngineFacts, prefill: int, decode: int, seed: int) -> dict[str, float]:
    scenario = Scenario("headrace", prefill, decode, 0, facts, seed=seed)
    records = Simulation(scenario, workload).run().records
    return _quantiles([record.ttft_s for record in records if record.ttft_s is not None])


def _ttft(candidate: dict[str, float]) -> float:
    return sum(candidate[part] for part in ("queue_s", "prefill_s", "handover_s", "first_step_s"))


# --- a plan against the fleet that it plans -------------------------------------------------------------------------


@app.command
def planned(
    *,
    trace: str | None = None,
    rate: float = 6.0,
    prompt_tokens: int = 1500,
    answer_tokens: int = 200,
    slo_ttft_s: float = 2.0,
    slo_itl_ms: float = 50.0,
    requests: int = 300,
    seed: int = 0,
    out: _Out = None,
) -> None:
    """Plan for a load, start the fleet that comes out with simulated engines, and send it that load.

    Args:
        trace: in place of lengths: a synthetic load or a trace, `rate` times as fast
    """
    check_file("json", out)
    slo = Slo(slo_ttft_s, slo_itl_ms / 1000)

    def sampled(facts: EngineFacts) -> Workload:
        if trace is not None:
            whole = load(trace, block_size=facts.block_size, seed=seed).scaled(rate)
            return sample.busiest(whole, requests)
        lengths = (prompt_tokens, answer_tokens)
        return sample.generated(rate, *lengths, block_size=facts.block_size, num_requests=requests, seed=seed)

    _write(uvloop.run(_planned(sampled, slo, seed)), out)


_ENGINE = {"HEADRACE_BLOCK_SIZE": "512", "HEADRACE_NUM_BLOCKS": "1000", "HEADRACE_CONTEXT_LENGTH": "200000"}


async def _planned(sampled: Callable[[EngineFacts], Workload], slo: Slo, seed: int) -> dict[str, Any]:
    print("asking a worker how fast it is …", flush=True)
    async with stack(*_fleet_flags(Fleet(num_both=1)), environment=_ENGINE) as running:
        live = read_fleet(await asyncio.to_thread(ask, running, "/v1/fleet"))
    bench = Bench(sampled(live.facts), live.facts, slo, seed)
    found = make_plan(bench, most=8, jobs=1)
    print(table(found))
    if found.best is None:
        raise SystemExit("no fleet of up to 8 workers holds the SLO: nothing to compare")
    fleet = found.best.fleet
    print(f"starting {fleet} …", flush=True)
    async with stack(*_fleet_flags(fleet), environment=_ENGINE | _told(slo)) as running:
        rng = random.Random(seed)
        cpu_s = _cpu_s()
        arrivals = [
            Arrival(session.start_s, "", "/v1/completions", completion_of(turn, running.model, live.facts, rng))
            for session in bench.workload.sessions
            for turn in session.turns[:1]
        ]
        print(f"{len(arrivals)} requests within {arrivals[-1].at_s:.0f} s …", flush=True)
        began = time.monotonic()
        samples = await replay(running, arrivals)
        idle = max(0.0, 1 - (_cpu_s() - cpu_s) / ((time.monotonic() - began) * (os.cpu_count() or 1)))
    from_s = WARM_UP * arrivals[-1].at_s
    judged = [each for arrival, each in zip(arrivals, samples, strict=True) if arrival.at_s >= from_s]
    result: dict[str, Any] = {
        "fleet": str(fleet),
        "planned": {"ttft_p99_s": found.best.ttft_p99_s, "itl_p99_s": found.best.itl_p99_s},
        "live": {"ttft_p99_s": _p99(_ttft_of(each) for each in judged), "itl_p99_s": _p99(map(_itl_of, judged))},
        "failed": sum(bool(each.error) for each in samples),
        "idle_cpu_share": idle,
    }
    print(f"{idle:.0%} of the CPU was idle; with little of it engines fall behind, and the live figures are of that")
    for name in ("ttft_p99_s", "itl_p99_s"):
        planned_s, live_s = result["planned"][name], result["live"][name]
        print(f"{name}: planned {planned_s:.4f}, live {live_s:.4f}, {planned_s / live_s - 1:+.1%} (aim: within 20 %)")
    return result


def _told(slo: Slo) -> dict[str, str]:
    """The gateway's settings that a plan's routers have: nobody is refused for an SLO."""
    return {
        "HEADRACE_SLO_TTFT_S": str(slo.ttft_s),
        "HEADRACE_SLO_ITL_MS": str(slo.tpot_s * 1000),
        "HEADRACE_REFUSE_LATE": "false",
    }


def _cpu_s() -> float:
    """Seconds that all CPUs of this machine have worked."""
    user, nice, system, _idle, _wait, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _fleet_flags(fleet: Fleet) -> list[str]:
    """Of `headrace up`."""
    roles = {"--prefill": fleet.num_prefill, "--decode": fleet.num_decode, "--both": fleet.num_both}
    return ["--engine", "sim", *(text for role, count in roles.items() for text in (role, str(count)))]


def _ttft_of(each: Sample) -> float:
    return math.inf if each.error else each.ttft_s


def _itl_of(each: Sample) -> float:
    """Mean, as its SLO has it."""
    if each.first_token_at is None or each.last_token_at is None or each.completion_tokens < 2:
        return 0.0
    return (each.last_token_at - each.first_token_at) / (each.completion_tokens - 1)


def _p99(values: Iterable[float]) -> float:
    return quantile(sorted(values), P99) or 0.0


# --- closed loops on fast engines ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Crowd:
    """Clients, and the two workers that serve them. seconds: 0: each client asks once."""

    shape: Shape
    prefill_tokens_per_s: int
    step_s: float
    max_step_tokens: int
    seconds: float

    def environment(self, policy: str) -> dict[str, str]:
        return {
            "HEADRACE_POLICY": policy,
            "HEADRACE_SIM_PREFILL_TOKENS_PER_S": str(self.prefill_tokens_per_s),
            "HEADRACE_SIM_STEP_S": str(self.step_s),
            "HEADRACE_MAX_STEP_TOKENS": str(self.max_step_tokens),
            "HEADRACE_CONTEXT_LENGTH": "8192",
            "HEADRACE_MAX_BATCH": "512",
            "HEADRACE_SIM_ANSWER_TOKENS": "0",
        }


_CROWDS = {
    "an H100 with an 8B model": _Crowd(Shape(256, 150, 1), 60_000, 0.010, 8192, 10.0),
    "prefill nearly free": _Crowd(Shape(256, 150, 1), 10_000_000, 0.005, 8192, 10.0),
    "all at once": _Crowd(Shape(3000, 150, 100), 60_000, 0.050, 8192, 0.0),
}
"""Prompts of 150 bytes are 170 tokens with the simulated model's template."""


@app.command
def closed(
    policies: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("headrace", "least_loaded"),
    *,
    rounds: int = 3,
    out: _Out = None,
) -> None:
    """Many clients at once on two fast simulated workers that do both: throughput and TTFT by policy, round by round.

    Clients, gateways and workers share this machine: where it is the bottleneck, what a policy costs counts too.

    Args:
        policies: compared with the last of them
        rounds: of each policy, in turn
    """
    check_file("json", out)
    allow_files(max(crowd.shape.concurrency for crowd in _CROWDS.values()) + 1000)
    _write(uvloop.run(_closed(policies, rounds)), out)


async def _closed(policies: Sequence[str], rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, crowd in _CROWDS.items():
        async with AsyncExitStack() as running:
            print(f"{name}: starting {len(policies)} fleets …", flush=True)
            flags = ("--engine", "sim", "--prefill", "0", "--decode", "0", "--both", "2")
            fleets = {
                policy: await running.enter_async_context(
                    stack(*flags, "--namespace", policy, environment=crowd.environment(policy))
                )
                for policy in policies
            }
            rows: dict[str, list[Row]] = {policy: [] for policy in policies}
            for number in range(rounds + 1):  # the first one warms up
                for policy, fleet in fleets.items():
                    target = Target(fleet.port, fleet.model, fleet.processes())
                    row = await closed_loop(target, f"{name} {number}", crowd.shape, seconds=crowd.seconds)
                    if number:
                        rows[policy].append(row)
                        print(f"round {number} of {rounds}: {_crowd_line(policy, row)}", flush=True)
        results[name] = {policy: [asdict(row) for row in found] for policy, found in rows.items()}
        _compare(rows, policies[-1])
    return results


def _crowd_line(policy: str, row: Row) -> str:
    return (
        f"{policy:13} {row.requests_per_s:7.1f} requests/s, TTFT p50 {row.ttft_p50_ms:.0f}, p99 {row.ttft_p99_ms:.0f} "
        f"ms, {row.cpu_us['gateway']:.0f} µs of the gateway's CPU per {row.per}, {row.errors} errors"
    )


def _compare(rows: dict[str, list[Row]], base: str) -> None:
    for policy in (name for name in rows if name != base):
        pairs = list(zip(rows[policy], rows[base], strict=True))
        rate = statistics.median(ours.requests_per_s / theirs.requests_per_s for ours, theirs in pairs)
        ttft = statistics.median(ours.ttft_p50_ms / theirs.ttft_p50_ms for ours, theirs in pairs)
        print(
            f"{policy} / {base}, median of {len(pairs)} rounds: throughput {rate:.3f} (aim: at least 0.98), "
            f"TTFT p50 {ttft:.3f} (aim: at most 1.05)",
            flush=True,
        )


# --- long prompts among chats, real vLLM -----------------------------------------------------------------------------


_WORDS = (
    "time",
    "people",
    "year",
    "way",
    "day",
    "thing",
    "world",
    "life",
    "hand",
    "part",
    "child",
    "eye",
    "place",
    "work",
)
"""One token each, as common words are in most vocabularies."""


def mixed_arrivals(model: str, seconds: float, seed: int, rate_scale: float, mark: str) -> list[Arrival]:
    """Poisson: prompts of 900 words, 0.5/s, 32 tokens out, among chats of 60 words, 0.8/s, 80 tokens out.

    They begin with `mark` and are the same else: workers that serve several variants must not know the prompts.
    """
    rng = random.Random(seed)

    def stream(rate: float, kind: str, num_words: int, num_tokens: int) -> list[Arrival]:
        found = []
        at = rng.expovariate(rate)
        while at < seconds:
            text = " ".join([f"{mark}:", *rng.choices(_WORDS, k=num_words)])
            body = {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            found.append(Arrival(at, kind, "/v1/chat/completions", body))
            at += rng.expovariate(rate)
        return found

    found = stream(0.5 * rate_scale, "long", 900, 32) + stream(0.8 * rate_scale, "chat", 60, 80)
    return sorted(found, key=lambda arrival: arrival.at_s)


@app.command
def mix(*, seconds: float = 60.0, rounds: int = 2, rate_scale: float = 1.0, seed: int = 0, out: _Out = None) -> None:
    """Long prompts among chats on vLLM and two cores: plain servers, always handed over, and as the router likes.

    Args:
        seconds: of arrivals in each round of each variant
        rate_scale: times 0.5 long prompts and 0.8 chats a second; take less where one core computes 900 tokens slowly
    """
    check_file("json", out)
    _write(uvloop.run(_mix(seconds, rounds, rate_scale, seed)), out)


async def _mix(seconds: float, rounds: int, rate_scale: float, seed: int) -> dict[str, Any]:
    plain_settings = {"HEADRACE_POLICY": "round_robin", "HEADRACE_HANDOVER": "none"}
    async with AsyncExitStack() as running:
        print("starting two plain workers …", flush=True)
        flags = ("--prefill", "0", "--decode", "0", "--both", "2", "--namespace", "plain")
        plain = await running.enter_async_context(stack(*flags, environment=plain_settings))
        print("starting one prefill and one decode worker …", flush=True)
        split = await running.enter_async_context(stack("--namespace", "split"))
        variants: dict[str, Callable[[list[Arrival]], Any]] = {
            "plain, round robin": lambda arrivals: replay(plain, arrivals),
            "headrace": lambda arrivals: replay(split, arrivals),
            "always handed over": lambda arrivals: replay(split, arrivals, {"x-headrace-handover": "always"}),
        }
        for variant, send in variants.items():
            print(f"warming up: {variant} …", flush=True)
            await send(mixed_arrivals(plain.model, 8.0, -1, 1.0, variant))
        samples: dict[str, list[tuple[Arrival, Sample]]] = {variant: [] for variant in variants}
        for number in range(rounds):
            for variant, send in variants.items():
                arrivals = mixed_arrivals(plain.model, seconds, seed + number, rate_scale, variant)
                print(f"round {number + 1} of {rounds}: {variant}, {seconds:g} s …", flush=True)
                samples[variant] += zip(arrivals, await send(arrivals), strict=True)
    results = {variant: _mix_result(found) for variant, found in samples.items()}
    for variant, result in results.items():
        print(f"{variant:20} " + ", ".join(f"{name} {value:.0f}" for name, value in result.items()))
    base, ours = results["plain, round robin"], results["headrace"]
    for name, aim in (("chat_ttft_p50_ms", 1.1), ("chat_itl_p99_ms", 0.1), ("long_ttft_p50_ms", 1.2)):
        print(f"{name}: {ours[name] / base[name]:.2f} of the plain servers' (aim: at most {aim})")
    for name in ("ttft_mean_ms", "whole_mean_ms"):
        print(f"{name}: {ours[name] / base[name]:.2f} of the plain servers'")
    return results


def _mix_result(found: list[tuple[Arrival, Sample]]) -> dict[str, float]:
    good = [(arrival.kind, sample) for arrival, sample in found if not sample.error]
    chats = [sample for kind, sample in good if kind == "chat"]
    longs = [sample for kind, sample in good if kind == "long"]
    gaps = sorted(gap for sample in chats for gap in sample.gaps_s)
    return {
        "chat_ttft_p50_ms": statistics.median(sample.ttft_s for sample in chats) * 1e3,
        "chat_ttft_p99_ms": _quantiles([sample.ttft_s for sample in chats])["p99"] * 1e3,
        "chat_itl_p50_ms": gaps[len(gaps) // 2] * 1e3,
        "chat_itl_p99_ms": gaps[int(len(gaps) * 0.99)] * 1e3,
        "chat_itl_max_ms": gaps[-1] * 1e3,
        "long_ttft_p50_ms": statistics.median(sample.ttft_s for sample in longs) * 1e3,
        "ttft_mean_ms": statistics.fmean(sample.ttft_s for _, sample in good) * 1e3,
        "whole_mean_ms": statistics.fmean(sample.ended_at - sample.sent_at for _, sample in good) * 1e3,
        "requests": len(found),
        "failed": len(found) - len(good),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {name: ordered[min(len(ordered) - 1, int(len(ordered) * q))] for name, q in _POINTS.items()}
    return {"mean": statistics.fmean(ordered)} | at


_POINTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def _line(quantiles: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in quantiles.items())


def _write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    app()
