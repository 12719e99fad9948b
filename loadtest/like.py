"""Workers like those of a running gateway, for the simulator: `--like http://gateway:8000`.

`GET /v1/fleet` tells of every worker its role and facts, and what the router has learned of its speed and of each link.
A fleet of another size is made of the same workers over and over; a role that nobody has there is played by all.
"""

import itertools
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from loadtest.simulator.scenario import Link, Scenario
from planes.wire.errors import UnusableSetting
from planes.wire.messages import EngineFacts, LatencyPrior, Role, WorkerId

KEY_VARIABLE: Final = "HEADRACE_API_KEY"
_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """`facts.latency` is what the router has learned. num_samples: from how many steps; 0: it is the worker's guess."""

    worker: WorkerId
    role: Role
    facts: EngineFacts
    num_samples: int


@dataclass(frozen=True, slots=True)
class LiveFleet:
    """The workers of one model, at least one, and the links that have handed over."""

    model: str
    workers: Sequence[LiveWorker]
    links: Mapping[tuple[WorkerId, WorkerId], Link]

    @property
    def facts(self) -> EngineFacts:
        """The first worker's."""
        return self.workers[0].facts

    def count(self, role: Role) -> int:
        return sum(worker.role is role for worker in self.workers)

    def scenario(self, base: Scenario) -> Scenario:
        """The same fleet with workers like these."""
        played: dict[WorkerId, LiveWorker] = {}
        for role in Role:
            named = [name for name, its_role in base.workers() if its_role is role]
            models = [worker for worker in self.workers if worker.role is role] or self.workers
            played |= zip(named, itertools.cycle(models))
        own_links = {
            (giver, taker): link
            for giver, taker in itertools.permutations(played, 2)
            if (link := self.links.get((played[giver].worker, played[taker].worker))) is not None
        }
        own_facts = {name: worker.facts for name, worker in played.items()}
        return replace(base, facts=self.facts, own_facts=own_facts, own_links=own_links)


def live_fleet(url: str, model: str = "") -> LiveFleet:
    """Ask a gateway; a key for it is in `HEADRACE_API_KEY`.  Raises:  UnusableSetting."""
    if not url.startswith(("http://", "https://")):
        raise UnusableSetting("like", url, "it must begin with http:// or https://")
    asked = urllib.request.Request(f"{url.rstrip('/')}/v1/fleet")  # noqa: S310 - checked above
    if key := os.environ.get(KEY_VARIABLE):
        asked.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(asked, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            told = json.load(answer)
    except urllib.error.HTTPError as exc:
        why = f"the gateway answers {exc.code}"
        raise UnusableSetting(
            "like", url, f"{why}; its API key goes into {KEY_VARIABLE}" if exc.code == 401 else why
        ) from exc
    except (OSError, ValueError) as exc:
        raise UnusableSetting("like", url, f"no gateway answers there: {exc}") from exc
    try:
        return read_fleet(told, model)
    except ValueError as exc:
        raise UnusableSetting("like", url, str(exc)) from exc


class _Told(msgspec.Struct):
    worker: WorkerId
    role: Role
    model: str
    facts: EngineFacts


class _Learned(msgspec.Struct):
    worker: WorkerId
    latency: LatencyPrior
    num_samples: int


class _Link(msgspec.Struct):
    prefill: WorkerId
    decode: WorkerId
    fixed_s: float
    bytes_per_s: float


class _Fleet(msgspec.Struct):
    """The part of `GET /v1/fleet` that is wanted here."""

    workers: list[_Told]
    router: list[_Learned]
    links: list[_Link]


def read_fleet(told: Any, model: str = "") -> LiveFleet:
    """From the body of `GET /v1/fleet`. model: which, where several are served.

    Raises:  ValueError that says what is missing.
    """
    fleet = msgspec.convert(told, _Fleet)
    learned = {each.worker: each for each in fleet.router}
    known = [each for each in fleet.workers if each.worker in learned and not each.facts.embedding_size]
    models = sorted({each.model for each in known})
    if not model and len(models) > 1:
        raise ValueError(f"it serves {', '.join(models)}; --like-model says which to take")
    chosen = [each for each in known if each.model == (model or models[0])] if known else []
    if not chosen:
        raise ValueError(
            f"it has no worker that generates{f' with {model}' if model else ''}; it has {models or 'none'}"
        )
    sizes = sorted({each.facts.block_size for each in chosen})
    if len(sizes) > 1:
        raise ValueError(f"its workers have blocks of {sizes} tokens; the simulator serves fleets with one size")
    workers = [
        LiveWorker(each.worker, each.role, _facts(each.facts, learned[each.worker]), learned[each.worker].num_samples)
        for each in chosen
    ]
    links = {(link.prefill, link.decode): Link(link.fixed_s, link.bytes_per_s) for link in fleet.links}
    return LiveFleet(chosen[0].model, workers, links)


def _facts(facts: EngineFacts, learned: _Learned) -> EngineFacts:
    """As the simulated engine takes them: one request may not need more than its cache holds."""
    context = min(facts.context_length, facts.num_blocks * facts.block_size - 1)
    return msgspec.structs.replace(facts, latency=learned.latency, context_length=context)
