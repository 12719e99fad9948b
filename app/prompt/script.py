"""What the simulated engine is told to say: the header `x-headrace-script`, for tests of clients without a model."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from app.openai.request_headers import SCRIPT
from app.prompt.tokenizer import Tokenizer
from planes.wire.errors import InvalidRequest
from planes.wire.frames import pack_tokens

_TEXTS: Final = msgspec.json.Decoder(list[str])


def scripted(header: str, messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> bytes:
    """The packed tokens of the answer that is due.

    Args:  header: a JSON list of answers, one for each turn of the assistant, the last one for all that follow; read
    in latin-1, as HTTP servers do.
    Raises:  InvalidRequest.
    """
    try:
        answers = _TEXTS.decode(header.encode("latin-1"))
    except (msgspec.DecodeError, UnicodeError) as exc:
        raise InvalidRequest(f"{SCRIPT} is no JSON list of texts: {exc}", param=SCRIPT) from exc
    if not answers:
        raise InvalidRequest(f"{SCRIPT} is an empty list; at least one text is needed", param=SCRIPT)
    turn = sum(message["role"] == "assistant" for message in messages)
    return pack_tokens(tokenizer.encode_text(answers[min(turn, len(answers) - 1)]))
