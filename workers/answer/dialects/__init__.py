"""One module for each API that clients speak; `Format.kind` chooses."""

from planes.wire.frames import Format
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Dialect
from workers.answer.dialects.chat import ChatDialect
from workers.answer.dialects.completion import CompletionDialect
from workers.answer.dialects.message import MessageDialect
from workers.answer.dialects.response import ResponseDialect

KINDS = ("chat", "completion", "message", "response")


def dialect(layout: Format, num_choices: int, vocabulary: Vocabulary, *, prompt_tokens: int) -> Dialect:
    """The writer of one answer.  Raises:  ValueError for a kind that is none of KINDS."""
    match layout.kind:
        case "chat":
            return ChatDialect(layout, num_choices, vocabulary)
        case "completion":
            return CompletionDialect(layout, num_choices, vocabulary)
        case "message":
            return MessageDialect(layout, prompt_tokens=prompt_tokens)
        case "response":
            return ResponseDialect(layout, vocabulary)
        case unknown:
            raise ValueError(f"{unknown!r} is no dialect; there are {', '.join(KINDS)}")
