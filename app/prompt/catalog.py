"""The models that this gateway can prepare requests for: tokenizer and chat template, from the cards of workers.

What a model is, is told by (name, card digest), and lives as long as a worker of it is registered. Workers of one name
may have different cards: a rolling upgrade, another block size, or a mistake. A request is prepared by one of them and
carries its digest, so that it reaches workers of that card alone. Which one a name stands for: the card with the most
workers that could decode now; among equals, the one whose newest worker started last.

Context and vocabulary are no part of a card. They are facts of the workers that are there, and change with them: the
largest context decides what is taken in (the router finds the workers with room), the smallest vocabulary which token
ids are.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from app.openai.errors import ModelNotFound
from app.prompt.card import CardUnusable, ModelUnusable, RenderingDiffers, entry_of
from app.prompt.prepare import ModelEntry
from planes.assets import LoadedCard, Store, fetch_card
from planes.probes import differ
from planes.wire.errors import InvalidRequest, Rejected
from planes.wire.messages import SIMULATED, Adapter, EngineFacts, Registration, WorkerId, WorkerState
from process.memory import return_freed_memory

_log = structlog.get_logger()

_MAX_CARDS = 64
"""A tokenizer may take 300 MB."""

_Key = tuple[str, str]
"""A model's name and its card's digest."""


class ModelLoading(Rejected):
    """Workers of this model are registered, but its tokenizer is not here yet."""

    code = "model_loading"

    def __init__(self, model: str) -> None:
        super().__init__(f"the tokenizer of {model!r} is being loaded; try again in a few seconds", retry_after_s=2.0)


class ModelBroken(Rejected):
    """Workers of this model are registered, and what they say of it cannot be used."""

    code = "model_unusable"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"what the workers of {model!r} say of it cannot be used here; the reason is in GET /v1/fleet and in the "
            "gateway's log"
        )


class NoModelYet(Rejected):
    """No worker has ever been here, so that nothing can be said about a model."""

    code = "no_worker"

    def __init__(self, model: str) -> None:
        super().__init__(f"no worker has registered here yet, for {model[:200]!r} or any model", retry_after_s=5.0)


class NoWorkerLeft(Rejected):
    """The workers of this model have gone."""

    code = "no_worker"

    def __init__(self, model: str) -> None:
        super().__init__(f"no worker of {model!r} is registered any more; start one or wait for one", retry_after_s=5.0)


@dataclass(frozen=True, slots=True)
class CardStatus:
    """One card of one model, as `GET /v1/fleet` shows it."""

    model: str
    card: str
    num_workers: int
    num_ready: int
    """Those that could decode a request now."""
    is_current: bool
    """Whether requests are prepared by this card."""
    is_loaded: bool
    context_length: int
    """The largest of its workers."""
    block_size: int


@dataclass(slots=True)
class _Served:
    """One registered worker."""

    registration: Registration
    is_up: bool = False

    @property
    def is_ready(self) -> bool:
        ready = self.registration.state is WorkerState.READY and self.registration.takes_answers
        return self.is_up and ready


class Models:
    """By the name that clients use."""

    def __init__(
        self,
        store: Store,
        cache_dir: Path,
        *,
        adapters: Mapping[str, Adapter] = MappingProxyType({}),
        max_cards: int = _MAX_CARDS,
    ) -> None:
        """
        Args:  adapters: those of the fleet, by name, as they come and go.  max_cards: beyond that the longest unused
        ones without workers are forgotten; then nothing new is taken.
        """
        self._adapters = adapters
        self._news = asyncio.Event()
        self._store = store
        self._cache_dir = cache_dir
        self._max_cards = max_cards
        self._cards: OrderedDict[_Key, ModelEntry] = OrderedDict()
        """Those loaded; first the ones that have been without workers for longest."""
        self._locks: dict[_Key, asyncio.Lock] = {}
        self._workers: dict[WorkerId, _Served] = {}
        self._current: dict[str, ModelEntry] = {}
        self._adapted: dict[str, ModelEntry] = {}
        """Of adapters that a worker has, until anything changes among workers."""
        self._unusable: set[_Key] = set()
        """Cards of registered workers that could not be used when they were tried last."""
        self._has_seen_worker = False

    @property
    def longest_context(self) -> int:
        """Tokens, over all models that can be served; 0 if there is none."""
        return max([entry.context_length for entry in self._current.values()], default=0)

    def entry(self, model: str) -> ModelEntry:
        """What prepares a request for this model now.

        Raises:  ModelNotFound, ModelLoading, ModelBroken, NoModelYet, NoWorkerLeft.
        """
        entry = self._current.get(model)
        if entry is not None:
            return entry
        if (adapter := self._adapters.get(model)) is not None:
            adapted = self._adapted.get(model)
            if adapted is not None and adapted.adapter is adapter:
                return adapted
            changed = replace(self.entry(adapter.parent), adapter=adapter)
            if "" not in self.answers(adapter).values():
                raise ModelLoading(model)
            self._adapted[model] = changed
            return changed
        keys = {_key(served.registration) for served in self._workers.values() if served.registration.model == model}
        if keys:
            raise ModelBroken(model) if keys <= self._unusable else ModelLoading(model)
        if not self._has_seen_worker:
            raise NoModelYet(model)
        if any(name == model for name, _ in self._cards):
            raise NoWorkerLeft(model)
        raise ModelNotFound(model)

    def answers(self, adapter: Adapter) -> dict[WorkerId, str | None]:
        """What the workers of its model say of it: empty if they have it, else why not; None: nothing yet."""
        own = [served.registration for served in self._workers.values() if served.registration.model == adapter.parent]
        return {each.worker: each.adapters.get(adapter.number) for each in own if each.state is WorkerState.READY}

    def changed(self) -> Coroutine[Any, Any, object]:
        """Ends when, from this call on, a worker has registered, changed its registration, or gone."""
        return self._news.wait()

    def context_length(self, model: str) -> int | None:
        """The largest of its registered workers; None if there are none."""
        if (adapter := self._adapters.get(model)) is not None:
            model = adapter.parent
        own = [served for served in self._workers.values() if served.registration.model == model]
        return _context_length(own) if own else None

    def for_task(self, *, is_embedding: bool) -> list[str]:
        """The names of those that make vectors, or of those that generate."""
        return sorted(name for name, entry in self._current.items() if (entry.embedding_size > 0) == is_embedding)

    def only(self, is_allowed: Callable[[str], bool] = lambda _: True) -> str:
        """The name of the one model that there is.  Raises:  InvalidRequest if there are several; NoModelYet.

        is_allowed: told a model's name, whether whoever asks may know of it.
        """
        names = sorted(filter(is_allowed, {served.registration.model for served in self._workers.values()}))
        if len(names) > 1:
            raise InvalidRequest(
                f"Missing required parameter: 'model'. {len(names)} models are served here: {', '.join(names)[:500]}.",
                param="model",
                code="missing_required_parameter",
            )
        if not names:
            raise NoModelYet("")
        return names[0]

    def statuses(self) -> list[CardStatus]:
        """Every card of every registered worker."""
        return [self._status(key, group) for key, group in sorted(self._groups(self._workers.values()).items())]

    # --- which workers there are -----------------------------------------------------------------------------------

    def registered(self, registration: Registration) -> None:
        """A worker registered, or changed its registration; `load` may follow."""
        self._has_seen_worker = True
        before = self._workers.get(registration.worker)
        is_up = before is not None and before.is_up and before.registration.epoch == registration.epoch
        self._workers[registration.worker] = _Served(registration, is_up)
        if before is not None and _key(before.registration) != _key(registration):
            self._left(before.registration)
        self._choose(registration.model)
        self._tell()

    def deregistered(self, worker: WorkerId) -> None:
        served = self._workers.pop(worker, None)
        if served is not None:
            self._left(served.registration)
        self._tell()

    def worker_up(self, worker: WorkerId) -> None:
        """Requests may be sent there from now on.  Raises:  ModelUnusable if they must not be."""
        served = self._workers[worker]
        key, facts = _key(served.registration), served.registration.facts
        for other in self._groups(self._workers.values())[key]:
            size = other.registration.facts.block_size
            if other.is_up and other is not served and size != facts.block_size:
                raise ModelUnusable(
                    f"{worker} has blocks of {facts.block_size} tokens; {other.registration.worker}, with the same "
                    f"model card, has {size}: prompts of {served.registration.model!r} are named in one size"
                )
        served.is_up = True
        self._choose(served.registration.model)

    def worker_down(self, worker: WorkerId) -> None:
        """Its stream was lost. Unknown workers are ignored."""
        served = self._workers.get(worker)
        if served is not None and served.is_up:
            served.is_up = False
            self._choose(served.registration.model)

    async def load(self, registration: Registration) -> None:
        """Fetch and build what `registration` needs, unless it is there.

        Raises:  ModelUnusable; AssetsUnavailable, EventPlaneUnavailable: try again later.
        """
        key = _key(registration)
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key in self._cards:
                _check_rendering(self._cards[key], registration)
                return
            self._make_room(key)
            card = await fetch_card(self._store, registration.card_digest, self._cache_dir)
            try:
                entry = await asyncio.to_thread(_built, registration.model, card, registration.facts)
            except CardUnusable:
                self._unusable.add(key)
                raise
            self._unusable.discard(key)
            self._make_room(key)
            self._cards[key] = entry
            _log.info("model.loaded", model=registration.model, card=key[1], tokenizer=entry.tokenizer.backend)
        _check_rendering(entry, registration)
        self._choose(registration.model)

    # --- the inside ------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _make_room(self, key: _Key) -> None:
        """Raises:  ModelUnusable if every card is in use: what works now is not given up for what comes."""
        served = self._groups(self._workers.values())
        idle = [known for known in self._cards if known not in served]
        while len(self._cards) >= self._max_cards:
            if not idle:
                raise ModelUnusable(
                    f"no room for {key[0]!r}: {len(self._cards)} model cards have workers here and the limit is "
                    f"{self._max_cards}; serve some of them by another gateway, in a namespace of its own"
                )
            del self._cards[idle.pop(0)]

    def _left(self, registration: Registration) -> None:
        """A worker does not serve what it has served."""
        key = _key(registration)
        if not any(_key(served.registration) == key for served in self._workers.values()):
            self._locks.pop(key, None)
            self._unusable.discard(key)
            if key in self._cards:
                self._cards.move_to_end(key)
        self._choose(registration.model)

    def _choose(self, model: str) -> None:
        """Decide which card the name stands for, and what its workers can do."""
        self._adapted.clear()
        own = [served for served in self._workers.values() if served.registration.model == model]
        groups = {key: group for key, group in self._groups(own).items() if key in self._cards}
        before = self._current.pop(model, None)
        if not groups:
            return
        key = max(groups, key=lambda key: _rank(groups[key]))
        self._current[model] = _with_facts(self._cards[key], groups[key])
        if before is not None and before.digest != key[1]:
            _log.warning("model.card_changed", model=model, card=key[1], before=before.digest, cards=len(groups))

    @staticmethod
    def _groups(workers: Iterable[_Served]) -> dict[_Key, list[_Served]]:
        groups: dict[_Key, list[_Served]] = {}
        for served in workers:
            groups.setdefault(_key(served.registration), []).append(served)
        return groups

    def _status(self, key: _Key, group: list[_Served]) -> CardStatus:
        model, digest = key
        current = self._current.get(model)
        return CardStatus(
            model=model,
            card=digest,
            num_workers=len(group),
            num_ready=sum(served.is_ready for served in group),
            is_current=current is not None and current.digest == digest,
            is_loaded=key in self._cards,
            context_length=_context_length(group),
            block_size=next(_block_sizes(group)),
        )


def _built(model: str, card: LoadedCard, facts: EngineFacts) -> ModelEntry:
    """`entry_of`, without what building it needed: of a large vocabulary that is more than what stays."""
    try:
        return entry_of(model, card, facts)
    finally:
        return_freed_memory()


def _key(registration: Registration) -> _Key:
    return registration.model, registration.card_digest


def _check_rendering(entry: ModelEntry, registration: Registration) -> None:
    """Raises:  RenderingDiffers."""
    ours, theirs = entry.rendering, registration.rendering
    if differ(ours, theirs):
        raise RenderingDiffers(registration.model, registration.worker, theirs, ours)


def _rank(group: list[_Served]) -> tuple[int, int, str]:
    newest = max(group, key=lambda served: served.registration.epoch).registration
    return sum(served.is_ready for served in group), newest.epoch, newest.card_digest


def _with_facts(entry: ModelEntry, group: list[_Served]) -> ModelEntry:
    return replace(
        entry,
        context_length=_context_length(group),
        block_size=next(_block_sizes(group)),
        vocab_size=min(served.registration.facts.vocab_size for served in group),
        max_batch=max(served.registration.facts.max_batch for served in group),
        lacks=frozenset[str]().union(*(served.registration.facts.lacks for served in group)),
        is_simulated=all(served.registration.engine == SIMULATED for served in group),
    )


def _context_length(group: list[_Served]) -> int:
    """Of those that could decode a request; a prefill worker alone answers nobody."""
    deciding = [served for served in group if served.registration.role.can_decode] or group
    return max(served.registration.facts.context_length for served in deciding)


def _block_sizes(group: list[_Served]) -> Iterator[int]:
    """Of those up, who agree, before the others."""
    for served in sorted(group, key=lambda served: not served.is_up):
        yield served.registration.facts.block_size
