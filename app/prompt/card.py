"""From a model card and its files to what prepares requests by it. Any worker may have written anything there."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec
import structlog

from app.prompt.parity import rendering_of
from app.prompt.prepare import ModelEntry
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer, UnusableTokenizerError
from planes.assets import LoadedCard, chat_template
from planes.probes import NOW
from planes.wire.errors import HeadraceError
from planes.wire.messages import EngineFacts
from planes.wire.unreadable import UNREADABLE

_log = structlog.get_logger()


class ModelUnusable(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """A worker's model cannot be served by this gateway as things stand."""

    code = "model_unusable"


class CardUnusable(ModelUnusable):
    """A card or a tokenizer is not what it should be: trying again hardly helps."""


class RenderingDiffers(CardUnusable):
    """This gateway would make other prompts than the worker's own code, not those that the model was made for."""

    code = "rendering_differs"

    def __init__(self, model: str, worker: str, theirs: str, ours: str) -> None:
        super().__init__(
            f"model {model!r}: {worker} renders or tokenizes the probes otherwise ({theirs[:10]}) than this gateway "
            f"({ours[:10]}); give both one version of Headrace, transformers and tokenizers"
        )


def entry_of(model: str, card: LoadedCard, facts: EngineFacts) -> ModelEntry:
    """Blocks for as long as a tokenizer takes to load; call it on a thread.

    Raises:  CardUnusable, whatever the card's files raise.
    """
    try:
        return _built(model, card, facts)
    except (KeyError, UnusableTokenizerError, *UNREADABLE) as exc:
        raise CardUnusable(f"model {model!r}, card {card.digest}: {exc}") from exc
    except BaseException as exc:  # nothing but the files speaks here, and what is written in Rust panics past Exception
        _log.exception("model.unusable", model=model, card=card.digest)
        raise CardUnusable(f"model {model!r}, card {card.digest}: {type(exc).__name__}: {exc}") from exc


def _built(model: str, card: LoadedCard, facts: EngineFacts) -> ModelEntry:
    config: dict[str, Any] = msgspec.json.decode(card.files.get("tokenizer_config.json", b"{}"), type=dict[str, Any])
    tokenizer = Tokenizer(card.files["tokenizer.json"], config)
    return ModelEntry(
        model=model,
        tokenizer=tokenizer,
        rendering=rendering_of(_template(model, card, tokenizer, clock=lambda: NOW), tokenizer),
        template=_template(model, card, tokenizer),
        context_length=facts.context_length,
        block_size=facts.block_size,
        vocab_size=facts.vocab_size,
        tool_parser=card.card.tool_parser,
        reasoning_parser=card.card.reasoning_parser,
        embedding_size=card.card.embedding_size,
        is_matryoshka=card.card.is_matryoshka,
        matryoshka_dimensions=card.card.matryoshka_dimensions,
        digest=card.digest,
    )


def _template(
    model: str, card: LoadedCard, tokenizer: Tokenizer, *, clock: Callable[[], datetime] = datetime.now
) -> ChatTemplate | None:
    """None if there is none that can be compiled: completions need none."""
    source = chat_template(card.files)
    if source is None:
        return None
    try:
        return ChatTemplate(source, tokenizer.special_tokens, variables=tokenizer.variables, clock=clock)
    except Exception as exc:  # noqa: BLE001 - Jinja's own, its compiler's depth, what its constant folding computes
        _log.error("template.unusable", model=model, card=card.digest, reason=f"{type(exc).__name__}: {exc}"[:500])
        return None
