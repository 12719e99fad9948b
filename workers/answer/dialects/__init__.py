"""One module for each API that clients speak; `Format.kind` chooses."""

import numpy as np
import numpy.typing as npt

from planes.wire.frames import Format, Sampling
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Dialect
from workers.answer.dialects.chat import ChatDialect
from workers.answer.dialects.completion import CompletionDialect
from workers.answer.dialects.message import MessageDialect
from workers.answer.dialects.response import ResponseDialect

KINDS = ("chat", "completion", "message", "response")


def dialect(layout: Format, sampling: Sampling, vocabulary: Vocabulary, *, prompt: npt.NDArray[np.uint32]) -> Dialect:
    """The writer of one answer.  prompt: its tokens, shape (n,).

    Raises:  ValueError for a kind that is none of KINDS.
    """
    match layout.kind:
        case "chat":
            return ChatDialect(layout, sampling, vocabulary, prompt)
        case "completion":
            return CompletionDialect(layout, sampling, vocabulary, prompt)
        case "message":
            return MessageDialect(layout, prompt_tokens=len(prompt))
        case "response":
            return ResponseDialect(layout, vocabulary)
        case unknown:
            raise ValueError(f"{unknown!r} is no dialect; there are {', '.join(KINDS)}")
