"""What a cell comes to: engine, fleet, requests and their arrivals."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
import numpy as np

from loadtest.grid.axes import Cell
from loadtest.grid.capacity import Capacity, capacity, slo
from loadtest.simulator.scenario import Scenario, engine_facts
from loadtest.slo import Slo
from loadtest.workloads import Session, Turn, Workload, lognormal, segment_names

GROUPS: Final = 12
"""Prefixes that requests share, where they do."""
TURNS: Final = 4
"""Of a session with tools …"""
TOOL_S: Final = 2.0
"""… and its mean pause between two."""
BURST_CV: Final = 10.0
_LONGEST: Final = {"100": 125, "1k": 1_250, "8k": 10_000, "60k": 75_000, "mixed": 32_000}
_KV_TOKENS: Final = 512_000
_LONGEST_RUN_S: Final = 900.0
_FEWEST: Final = 100
_ROUNDS: Final = 3
_PATIENCE_S: Final = 14_400.0
"""After the last start, and in a closed loop in all."""
_MOST_ANSWERS: Final = 4  # times the mean
_ROLES: Final[Mapping[str, tuple[int, int, int]]] = {
    "both": (0, 0, 4),
    "3+1": (3, 1, 0),
    "2+2": (2, 2, 0),
    "1+3": (1, 3, 0),
}
"""Workers that prefill, that decode, that do both."""

Conversation = tuple[Turn, ...]
"""Requests that follow each other."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A cell ready to be served. `scenario` still lacks its policy."""

    name: str
    title: str
    values: dict[str, Any]
    scenario: Scenario
    workload: Workload
    slo: Slo
    estimate: Capacity | None = None


def setup(cell: Cell, seed: int) -> Setup:
    """Draw a cell. Equal seeds draw equal cells."""
    scenario = _scenario(cell, seed)
    block_size, rng = scenario.facts.block_size, random.Random(f"{seed}/cell {cell.number}")
    draw, count = _conversations(cell, block_size, rng), _num_conversations(cell)
    conversations = list(itertools.islice(draw, count))
    estimate = capacity(_turns(conversations), scenario)
    per_s, rounds = cell.load * estimate.requests_per_s, 0
    if cell.arrivals == "closed":  # more than one conversation each, as far as that is not too many
        rounds = _ROUNDS * _num_clients(cell, estimate, conversations)
        conversations += itertools.islice(draw, max(0, min(rounds, _ROUNDS * count) - count))
    conversations = _shortened(conversations, per_s, fewest=rounds)
    turns = _turns(conversations)
    num_clients, starts = None, [0.0] * len(conversations)
    if cell.arrivals == "closed":
        num_clients = _num_clients(cell, estimate, conversations)
    else:
        starts = ARRIVALS[cell.arrivals](len(conversations), per_s * len(conversations) / len(turns), rng)
    sessions = tuple(Session(at, each) for at, each in zip(starts, conversations, strict=True))
    return Setup(
        name=str(cell.number),
        title=str(cell),
        values=cell.values,
        scenario=scenario,
        workload=Workload(str(cell), block_size, sessions, num_clients),
        slo=slo(turns, scenario),
        estimate=estimate,
    )


def _num_conversations(cell: Cell) -> int:
    """As many as show a queue build up, and as few as are served in a second or two."""
    requests = {1: 1200, 16: 1200, 300: 800, 2_000: 450}[cell.answers]
    if cell.prompts == "60k":
        requests //= 3
    return requests * 3 // 2 // TURNS if cell.sharing == "sessions" else requests


def _num_clients(cell: Cell, estimate: Capacity, conversations: Sequence[Conversation]) -> int:
    turns = _turns(conversations)
    return estimate.clients(cell.load, sum(turn.think_s for turn in turns) / len(turns))


def _shortened(conversations: list[Conversation], per_s: float, *, fewest: int) -> list[Conversation]:
    """So many that they come within `_LONGEST_RUN_S`; and where all come in a few seconds, with shorter pauses, so that
    the load is there before it is over.
    """
    per_conversation = len(conversations[0])
    most = max(fewest, _FEWEST // per_conversation, int(_LONGEST_RUN_S * per_s / per_conversation))
    kept = conversations[:most]
    hurry = min(1.0, len(kept) * per_conversation / per_s / (10 * TOOL_S))
    return [tuple(replace(turn, think_s=turn.think_s * hurry) for turn in conversation) for conversation in kept]


def _turns(conversations: Sequence[Conversation]) -> list[Turn]:
    return [turn for conversation in conversations for turn in conversation]


# --- engine and fleet ------------------------------------------------------------------------------------------------


def _scenario(cell: Cell, seed: int) -> Scenario:
    """Fast engines take more tokens a step, and have the faster network. A step costs the same, whatever it does."""
    longest = _LONGEST[cell.prompts] + TURNS * _MOST_ANSWERS * cell.answers
    block_size, is_fast = 16 if cell.prompts in {"100", "1k"} else 64, cell.prefill > 10_000
    facts = engine_facts(
        block_size=block_size,
        num_blocks=max(_KV_TOKENS, 16 * longest) // block_size,
        link_gbps=400 if is_fast else 100,
        prefill_tokens_per_s=cell.prefill,
        step_s=cell.step_ms / 1000,
        max_batch={300: 32, 2_000: 16}.get(cell.answers, 128),
        max_step_tokens=8192 if is_fast else 2048,
        is_shortest_first=cell.order == "shortest first",
    )
    speed = msgspec.structs.replace(facts.latency, prefill_fixed_s=facts.latency.step_fixed_s)
    facts = msgspec.structs.replace(facts, latency=speed)
    what, _, roles = cell.fleet.rpartition(" ")
    scenario = Scenario("", *_ROLES[roles], facts=facts, seed=seed, drain_s=_PATIENCE_S)
    if what == "slow":
        return replace(scenario, slow_worker=2.0)
    return replace(scenario, num_gateways=2) if what else scenario


# --- requests --------------------------------------------------------------------------------------------------------


def _conversations(cell: Cell, block_size: int, rng: random.Random) -> Iterator[Conversation]:
    """Requests that follow each other, one after the other; a single one where no session is asked for."""
    ids = itertools.count(GROUPS)
    if cell.sharing == "sessions":
        while True:
            yield _session(cell, ids, block_size, rng)
    share = {"none": 0.0, "half": 0.5, "95%": 0.95}[cell.sharing]
    prefixes = [int(share * _prompt(cell, rng)) for _ in range(GROUPS)]
    while True:
        group = rng.randrange(GROUPS)
        own = max(1, int((1 - share) * _prompt(cell, rng)))
        segments = [(group, prefixes[group]), (next(ids), own)] if share else [(next(ids), own)]
        yield (_turn(0.0, segments, _answer(cell, rng), 0, block_size),)


def _session(cell: Cell, ids: Iterator[int], block_size: int, rng: random.Random) -> Conversation:
    """Four turns with tools' pauses between them. A prompt holds all before it; without answers it is as long as the
    cell's in the mean.
    """
    tokens, segments, turns = _prompt(cell, rng), list[tuple[int, int]](), list[Turn]()
    for number in range(TURNS):
        segments.append((next(ids), max(1, tokens // 4 if number else tokens * 5 // 8)))
        answer = (next(ids), _answer(cell, rng))
        pause_s = rng.expovariate(1 / TOOL_S) if number else 0.0
        turns.append(_turn(pause_s, [*segments, answer], answer[1], answer[1], block_size))
        segments.append(answer)
    return tuple(turns)


def _turn(think_s: float, segments: list[tuple[int, int]], answer: int, named: int, block_size: int) -> Turn:
    """named: tokens of the answer that are among `segments`."""
    prompt_tokens = sum(tokens for _, tokens in segments) - named
    return Turn(think_s, prompt_tokens, answer, segment_names(segments, block_size))


def _prompt(cell: Cell, rng: random.Random) -> int:
    if cell.prompts == "mixed":
        return max(16, lognormal(rng, 1_000, 1.3, _LONGEST["mixed"]))
    return int(_LONGEST[cell.prompts] * rng.uniform(0.6, 1.0))


def _answer(cell: Cell, rng: random.Random) -> int:
    """With the cell's mean, spread by about half of it."""
    if cell.answers == 1:
        return 1
    sigma = 0.5
    return lognormal(rng, cell.answers * math.exp(-(sigma**2) / 2), sigma, _MOST_ANSWERS * cell.answers)


# --- arrivals --------------------------------------------------------------------------------------------------------


def poisson_starts(count: int, per_s: float, rng: random.Random) -> list[float]:
    return gamma_starts(count, per_s, rng, cv=1.0)


def gamma_starts(count: int, per_s: float, rng: random.Random, *, cv: float = BURST_CV) -> list[float]:
    """Gaps drawn from a Gamma distribution with this coefficient of variation, stretched to the rate asked for."""
    gaps = [rng.gammavariate(1 / cv**2, 1.0) for _ in range(count)]
    return [float(at) for at in np.cumsum(gaps) * count / per_s / sum(gaps)]


def diurnal_starts(count: int, per_s: float, rng: random.Random) -> list[float]:
    """A day as long as the run: from a fifth of the mean rate up to nine fifths and back."""
    day = np.linspace(0.0, 1.0, 1001)
    passed = day - 0.8 / (2 * math.pi) * np.sin(2 * math.pi * day)
    return [float(at) for at in np.interp(sorted(rng.random() for _ in range(count)), passed, day) * count / per_s]


ARRIVALS: Final[Mapping[str, Callable[[int, float, random.Random], list[float]]]] = {
    "poisson": poisson_starts,
    "bursts": gamma_starts,
    "diurnal": diurnal_starts,
}
"""How many, at which mean rate → when, ascending."""
