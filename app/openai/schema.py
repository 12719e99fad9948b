"""What the gateway knows of a request after parsing, in whichever dialect it came, and how much one may ask for."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from planes.wire.frames import Parsing, Sampling

Json = Any
"""Any JSON value, decoded."""

NULL: Final = msgspec.Raw(b"null")
"""A field that was left out. Fields whose value is not looked at stay raw: a large one would be dear to build."""


class Kind(StrEnum):
    """Which dialect; the values are those of `planes.wire.frames.Format.kind`."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSE = "response"
    MESSAGE = "message"
    EMBEDDING = "embedding"

    @property
    def is_conversation(self) -> bool:
        """Whether its prompt is made of messages, by the model's chat template."""
        return self not in _OF_TEXT


_OF_TEXT: Final = (Kind.COMPLETION, Kind.EMBEDDING)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for. Counts, and characters for strings."""

    num_choices: int = 128
    num_stop: int = 16
    stop_chars: int = 1024
    num_stop_token_ids: int = 128
    num_logprobs: int = 20
    num_logit_bias: int = 1024
    num_messages: int = 16_384
    template_kwargs_bytes: int = 65_536
    num_tools: int = 1024
    num_documents: int = 1024
    num_bad_words: int = 128
    num_prompts: int = 128
    schema_bytes: int = 262_144
    """Of a JSON schema, a grammar, a regular expression or a list of choices."""
    has_strict_fields: bool = False
    """Whether fields that nobody knows are refused."""


class ParsedRequest(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """A request whose every field is valid by itself; what depends on the model is checked by `app/prompt/prepare.py`.

    messages, tools, documents: chat only, as the template gets them.  prompt: completions only, text or token ids
    (shape (n,), uint32).
    sampling: ranges checked; its `max_tokens` is 0 until `Preprocessor.prepare` has resolved the `max_tokens` here,
    where None means: as many as the context has room for.  (A struct, because it is made ten times as fast as a frozen
    dataclass of so many fields.)
    """

    kind: Kind
    model: str
    sampling: Sampling
    max_tokens: int | None
    messages: tuple[dict[str, Json], ...] = ()
    template_kwargs: dict[str, Json] | None = None
    prompt: str | npt.NDArray[np.uint32] = ""
    more_prompts: tuple[str | npt.NDArray[np.uint32], ...] = ()
    """Each of them is answered as if it had come alone, but in one answer: see `app/http/merged.py`."""
    is_streaming: bool = False
    include_usage: bool = False
    echo: bool = False
    priority: int | None = None
    """Lower is sooner; None: the tenant's default."""
    cache_salt: str = ""
    user: str = ""
    num_bytes: int = 0
    """Of the body: a bound on the text in it, for whoever must decide how dear it is."""
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    timeout_s: float | None = None
    tools: tuple[dict[str, Json], ...] = ()
    documents: tuple[dict[str, Json], ...] = ()
    parsing: Parsing | None = None
    """What the worker looks for in the text; None: nothing."""
    is_reply: bool = True
    """Whether the prompt ends where an assistant's turn begins; the template's `add_generation_prompt`."""
    is_continued: bool = False
    """Whether the last message is left open, for the answer to go on with it."""
    truncate_prompt_tokens: int | None = None
    """Keep this many of the prompt's last tokens; -1: as many as leave room for an answer.  None: all or none."""
    bad_words: tuple[str, ...] = ()
    """They become `Sampling.bad_words` where the tokenizer is known."""
    is_prewarm: bool = False
    """Whether only the prompt is to be computed, for a later request to find cached."""
    has_continuous_usage: bool = False
    has_token_ids: bool = False
    ignored: tuple[str, ...] = ()
    """Names of fields that nobody here knows."""
    repeated: bytes = b""
    """JSON object of what the answer says again of the request."""
