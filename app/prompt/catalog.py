"""The models that this gateway can prepare requests for: tokenizer and chat template, from the cards of workers."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import structlog

from app.openai.errors import ModelNotFound
from app.prompt.prepare import ModelEntry, chat_template_of
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer, UnusableTokenizerError
from planes.assets import LoadedCard, Store, fetch_card
from planes.wire.errors import HeadraceError, Rejected
from planes.wire.messages import EngineFacts, Registration

_log = structlog.get_logger()

_MAX_MODELS = 64
"""Beyond that the oldest is forgotten, and loaded again when a worker of it connects."""


class ModelUnusable(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """A worker's model cannot be served by this gateway."""

    code = "model_unusable"


class ModelLoading(Rejected):
    """Workers of this model are registered, but its tokenizer is not here yet."""

    code = "model_loading"

    def __init__(self, model: str) -> None:
        super().__init__(f"the tokenizer of {model!r} is being loaded; try again in a few seconds", retry_after_s=2.0)


class NoModelYet(Rejected):
    """No worker has ever been here, so that nothing can be said about a model."""

    code = "no_worker"

    def __init__(self, model: str) -> None:
        super().__init__(f"no worker has registered here yet, for {model[:200]!r} or any model", retry_after_s=5.0)


class Models:
    """By the name that clients use. The newest card of a name wins."""

    def __init__(self, store: Store, cache_dir: Path) -> None:
        self._store = store
        self._cache_dir = cache_dir
        self._entries: dict[str, ModelEntry] = {}
        self._digests: dict[str, str] = {}
        self._loading: dict[str, asyncio.Lock] = {}

    @property
    def longest_context(self) -> int:
        """Tokens, over all models that can be served; 0 if there is none."""
        return max([entry.context_length for entry in self._entries.values()], default=0)

    def entry(self, model: str) -> ModelEntry:
        """Raises:  ModelNotFound, ModelLoading, NoModelYet."""
        entry = self._entries.get(model)
        if entry is not None:
            return entry
        if model in self._loading:
            raise ModelLoading(model)
        if not self._loading:
            raise NoModelYet(model)
        raise ModelNotFound(model)

    async def load(self, registration: Registration) -> None:
        """Fetch and build what `registration` needs, unless it is there.

        Raises:  ModelUnusable; AssetsUnavailable, EventPlaneUnavailable: try again later.
        """
        model = registration.model
        if model not in self._loading and len(self._loading) >= _MAX_MODELS:
            self._forget(next(iter(self._loading)))
        async with self._loading.setdefault(model, asyncio.Lock()):
            if self._digests.get(model) == registration.card_digest:
                self._check_facts(registration)
                return
            card = await fetch_card(self._store, registration.card_digest, self._cache_dir)
            self._entries[model] = await asyncio.to_thread(_entry, model, card, registration.facts)
            self._digests[model] = registration.card_digest
            _log.info("model.loaded", model=model, tokenizer=self._entries[model].tokenizer.backend)

    def _forget(self, model: str) -> None:
        for table in (self._entries, self._digests, self._loading):
            table.pop(model, None)

    def _check_facts(self, registration: Registration) -> None:
        """Prompts are named in blocks of one size, and cut to the smallest context."""
        entry, facts = self._entries[registration.model], registration.facts
        if facts.block_size != entry.block_size:
            raise ModelUnusable(
                f"{registration.worker} has blocks of {facts.block_size} tokens; the model's other workers "
                f"have {entry.block_size}: start all workers of {registration.model!r} with one block size"
            )
        if facts.context_length < entry.context_length:
            self._entries[registration.model] = replace(entry, context_length=facts.context_length)


def _entry(model: str, card: LoadedCard, facts: EngineFacts) -> ModelEntry:
    """Blocks for as long as a tokenizer takes to load."""
    try:
        config: dict[str, Any] = msgspec.json.decode(
            card.files.get("tokenizer_config.json", b"{}"), type=dict[str, Any]
        )
        tokenizer = Tokenizer(card.files["tokenizer.json"], config)
    except (KeyError, msgspec.DecodeError, UnusableTokenizerError) as exc:
        raise ModelUnusable(f"model {model!r}, card {card.digest}: {exc}") from exc
    return ModelEntry(
        model=model,
        tokenizer=tokenizer,
        template=_template(model, card, config, tokenizer),
        context_length=facts.context_length,
        block_size=facts.block_size,
        vocab_size=facts.vocab_size,
    )


def _template(model: str, card: LoadedCard, config: dict[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
    file = card.files.get("chat_template.jinja")
    source = chat_template_of(config) if file is None else file.decode(errors="replace")
    if source is None:
        return None
    try:
        return ChatTemplate(source, tokenizer.special_tokens, variables=tokenizer.variables)
    except jinja2.TemplateSyntaxError as exc:
        _log.error("template.unusable", model=model, reason=str(exc))
        return None
