"""What the simulated engine is told to say: the header `x-headrace-script`, for tests of clients without a model."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from app.openai.request_headers import SCRIPT
from app.prompt.prepare import ModelEntry
from planes.wire.errors import InvalidRequest
from planes.wire.frames import pack_tokens
from planes.wire.unreadable import UNREADABLE

_TEXTS: Final = msgspec.json.Decoder(list[str])


def scripted(header: str, messages: Sequence[dict[str, Any]], model: ModelEntry) -> bytes:
    """The packed tokens of the answer that is due.

    Args:  header: a JSON list of answers, one for each turn of the assistant, the last one for all that follow; read
    in latin-1, as HTTP servers do.
    Raises:  InvalidRequest.
    """
    if not model.is_simulated:
        raise InvalidRequest(
            f"{SCRIPT} is for the simulated engine, and '{model.model}' has workers that compute; leave it out",
            param=SCRIPT,
            code="unsupported_parameter",
        )
    try:
        answers = _TEXTS.decode(header.encode("latin-1"))
    except (UnicodeError, *UNREADABLE) as exc:
        raise InvalidRequest(f"{SCRIPT} is no JSON list of texts: {exc}", param=SCRIPT) from exc
    if not answers:
        raise InvalidRequest(f"{SCRIPT} is an empty list; at least one text is needed", param=SCRIPT)
    turn = sum(message["role"] == "assistant" for message in messages)
    return pack_tokens(model.tokenizer.encode_text(answers[min(turn, len(answers) - 1)]))
