"""Find the cheapest fleet for a load: `headrace plan --help`."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number

from app.recording import TRACE_BLOCK_SIZE
from loadtest.engine_flags import AT_LEAST_1, POSITIVE, RATE, STANDARD, EngineFlags, check_unused
from loadtest.plan import sample
from loadtest.plan.report import Plan, explained, in_order, missed, table
from loadtest.plan.search import search_both, search_split
from loadtest.plan.trial import Bench, Fleet, Need, Trial, need
from loadtest.progress import each
from loadtest.simulate import check_plots, versions
from loadtest.slo import Slo
from loadtest.workloads import GENERATORS, Workload, check_fits, load, most_prompt_tokens
from loadtest.written import check_file
from planes.wire.errors import UnusableSetting
from planes.wire.messages import EngineFacts
from process.logging import configure
from process.settings import run

_STAYS: Final = 5.0
"""The sample lasts at least so many times as long as a request stays …"""
_MOST_REQUESTS: Final = 4
"""… but has at most so many times the requests asked for."""
_TOLD_EVERY_S: Final = 5.0
_PROMPT_TOKENS: Final = 1500
_ANSWER_TOKENS: Final = 200

app = App(name="headrace plan", help="Find the cheapest fleet that holds an SLO.", version_flags=[])


@dataclass(frozen=True, slots=True)
class Search:
    """One kind of fleet after the other, each in a process of its own if there are two."""

    bench: Bench
    need: Need
    most: int

    def trials(self, kind: str) -> list[Trial]:
        found = Trials(self.bench, self.most)
        (search_both if kind == "both" else search_split)(found.trial, self.need, self.most)
        return list(found.made.values())


@dataclass(slots=True)
class Trials:
    """Every fleet is tried once, the largest to the end; each is told on standard error, and how far it is."""

    bench: Bench
    most: int
    made: dict[Fleet, Trial] = field(default_factory=dict)

    def trial(self, fleet: Fleet) -> Trial:
        if fleet not in self.made:
            begun = time.monotonic()
            found = self.made[fleet] = self.bench.trial(fleet, told(fleet), is_whole=fleet.workers == self.most)
            outcome = "holds" if found.holds else f"misses by {missed(found)}"
            print(f"{fleet}: {outcome} ({time.monotonic() - begun:.1f} s)", file=sys.stderr, flush=True)
        return self.made[fleet]


def told(fleet: Fleet, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """What a trial calls with requests ended and all of them: a line every few seconds."""
    told_at = clock()

    def tell(ended: int, count: int) -> None:
        nonlocal told_at
        if clock() >= told_at + _TOLD_EVERY_S:
            told_at = clock()
            print(f"{fleet}: {ended} of {count} requests …", file=sys.stderr, flush=True)

    return tell


def plan(bench: Bench, *, most: int, jobs: int) -> Plan:
    """Search both kinds. `settings` is left to the caller."""
    rate = sample.requests_per_s(bench.workload)
    needed = need(bench, rate)
    search = Search(bench, needed, most)
    trials = [trial for found in each(search.trials, ("both", "split"), min(jobs, 2)) for trial in found]
    return Plan(
        load=bench.workload.name,
        requests_per_s=rate,
        num_requests=bench.workload.num_requests,
        slo=bench.slo,
        alone_p99_s=needed.alone_p99_s,
        empty_step_s=bench.facts.latency.step_fixed_s,
        trials=in_order(trials),
        settings={"seed": bench.seed, "policy": bench.policy, "engine": msgspec.to_builtins(bench.facts)},
        versions=versions(),
    )


@app.default
def main(
    *,
    trace: str | None = None,
    rate: Annotated[float | None, RATE] = None,
    prompt_tokens: Annotated[int | None, AT_LEAST_1] = None,
    answer_tokens: Annotated[int | None, AT_LEAST_1] = None,
    rate_scale: Annotated[float | None, RATE] = None,
    slo_ttft_s: Annotated[float, POSITIVE] = 2.0,
    slo_itl_ms: Annotated[float, POSITIVE] = 50.0,
    engine: EngineFlags = STANDARD,
    max_workers: Annotated[int, AT_LEAST_1] = 64,
    requests: Annotated[int, Parameter(validator=Number(gte=50))] = 1000,
    seed: int = 0,
    policy: str = "headrace",
    explain: bool = False,
    json: Path | None = None,
    png: Path | None = None,
    jobs: Annotated[int, AT_LEAST_1] = 2,
) -> int:
    """Try fleets with the simulator and the production router; print those that hold the SLO and those that miss it.

    The exit status is 1 if none of them holds it.

    Args:
        trace: yesterday's load: a folder that `headrace gateway --record` wrote, or a file in Mooncake's format
        rate: requests a second, if there is no trace; then lengths are lognormal about the two means
        prompt_tokens: mean tokens of a prompt, without a trace; 1,500 if not given
        answer_tokens: mean tokens of an answer, without a trace; 200 if not given
        rate_scale: the trace so many times as fast; as it is if not given
        slo_ttft_s: seconds until the first token, at p99
        slo_itl_ms: mean milliseconds between a request's tokens, at p99
        engine: of every worker
        max_workers: of a fleet
        requests: of the sample that each fleet serves; a trace's busiest so many. More where requests stay long
        seed: of arrivals, lengths and ties
        policy: which the router follows
        explain: say why, in sentences
        json: write everything there
        png: write a picture there
        jobs: 2: search both kinds of fleets at once
    """
    check_plots("png", png)
    for setting, path in (("json", json), ("png", png)):  # now rather than after minutes
        check_file(setting, path)
    facts, live = engine.read()
    slo = Slo(slo_ttft_s, slo_itl_ms / 1000)
    sampled = _load(facts, seed, trace, rate_scale, rate, prompt_tokens, answer_tokens)
    with _one_line():
        bench = _settled(Bench(sampled(requests), facts, slo, seed, policy, live), sampled, requests)
        check_fits(bench.workload, facts)
        found = plan(bench, most=max_workers, jobs=jobs)
    print(table(found))
    if explain:
        print("\n" + "\n".join(explained(found)))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    if png is not None:
        from loadtest.plots import plan_picture  # noqa: PLC0415 - matplotlib, which the table does without

        png.write_bytes(plan_picture(found))
    if found.best is None:
        print(f"no fleet of up to {max_workers} workers holds the SLO; --explain says why", file=sys.stderr)
    return int(found.best is None)


@contextmanager
def _one_line() -> Iterator[None]:
    """What cannot be planned is told in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def _load(
    facts: EngineFacts,
    seed: int,
    trace: str | None,
    rate_scale: float | None,
    rate: float | None,
    prompt_tokens: int | None,
    answer_tokens: int | None,
) -> Callable[[int], Workload]:
    """What draws a sample of so many requests.  Raises:  UnusableSetting for what says nothing about that load."""
    if (trace is None) == (rate is None):
        raise UnusableSetting("trace", trace, "either --trace or --rate says what the load is")
    if rate is None:
        check_unused("without --trace", prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)
        return lambda count: sample.busiest(_trace(trace or "", facts, seed).scaled(rate_scale or 1.0), count)
    check_unused("with --trace", rate_scale=rate_scale)
    lengths = prompt_tokens or _PROMPT_TOKENS, answer_tokens or _ANSWER_TOKENS
    if lengths[0] > (most := most_prompt_tokens(facts)):
        raise UnusableSetting("prompt_tokens", lengths[0], f"a worker takes at most {most}; raise --blocks")
    return lambda count: sample.generated(rate, *lengths, block_size=facts.block_size, num_requests=count, seed=seed)


def _trace(name: str, facts: EngineFacts, seed: int) -> Workload:
    """Raises:  UnusableSetting, ValueError, FileNotFoundError."""
    if TRACE_BLOCK_SIZE % facts.block_size and name not in GENERATORS:
        raise UnusableSetting("block_size", facts.block_size, f"for a trace it must divide {TRACE_BLOCK_SIZE}")
    return load(name, block_size=facts.block_size, seed=seed)


def _settled(bench: Bench, sampled: Callable[[int], Workload], count: int) -> Bench:
    """With a sample that is long enough for requests to come and go several times."""
    rate = sample.requests_per_s(bench.workload)
    wanted = math.ceil(rate * _STAYS * need(bench, rate).stay_s)
    if wanted <= count:
        return bench
    return replace(bench, workload=sampled(min(wanted, _MOST_REQUESTS * count)))


if __name__ == "__main__":
    configure("error")
    sys.exit(run(app))
