"""From a parsed request to what is sent and routed: the prompt's tokens, its block names, the resolved sampling.

Short requests are parsed, rendered and tokenized on the event loop (microseconds), long ones of every kind on a small
thread pool, whose size bounds how many run at once. A prompt that provably cannot fit is not tokenized at all.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from app.openai.schema import Json, Kind, ParsedRequest
from app.prompt.nonce import without_nonce
from app.prompt.sandbox import TemplateError
from app.prompt.template import ChatTemplate
from app.prompt.tokenizer import Tokenizer
from planes.wire import blocks
from planes.wire.blocks import Hashes, Tokens
from planes.wire.errors import Expired, InvalidRequest, Rejected
from planes.wire.frames import Sampling
from planes.wire.messages import Adapter

Result = TypeVar("Result")

_EMBEDDING: Final = Kind.EMBEDDING  # bound once, see CONTRIBUTING.md
_FIELD: Final = {
    Kind.CHAT: "messages",
    Kind.COMPLETION: "prompt",
    Kind.RESPONSE: "input",
    Kind.MESSAGE: "messages",
    Kind.EMBEDDING: "input",
}
"""The field that a client wrote the prompt in."""

DEFAULT_INLINE_BYTES: Final = 16_384
"""Tokenizing this much takes about half a millisecond; a thread costs a tenth of one and leaves the loop free."""


class ContextExceeded(InvalidRequest):
    """Prompt, or prompt and completion, are longer than the model's context."""

    code = "context_length_exceeded"


class PreparationTimeout(Expired):
    """The request's time was over before its prompt was tokens."""

    code = "deadline"

    def __init__(self) -> None:
        super().__init__("the request's time was over while its prompt waited to be tokenized")


class TokenizersBusy(Rejected):
    """Too many long prompts wait to be tokenized."""

    code = "tokenizers_busy"

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} long prompts wait to be tokenized and the limit is {limit}", retry_after_s=1.0)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What the gateway needs of a model to prepare its requests. Lengths in tokens."""

    model: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    context_length: int
    block_size: int
    vocab_size: int
    """Of the engine, which may pad beyond the tokenizer's."""
    max_batch: int = 1 << 30
    """Most choices of one request."""
    tool_parser: str = ""
    """What its workers read tool calls with; "": they read none."""
    reasoning_parser: str = ""
    """What its workers tell thoughts from answers with; "": they do not."""
    rendering: str = ""
    """Digest of the probes (`planes/probes.py`) as this gateway renders and tokenizes them."""
    embedding_size: int = 0
    """Numbers in the vectors that its workers make of prompts; 0: they generate."""
    is_matryoshka: bool = False
    """Whether a vector's first numbers are one by themselves."""
    matryoshka_dimensions: tuple[int, ...] = ()
    """If so: how many of them; none: any number."""
    is_simulated: bool = False
    """Whether all its workers say what they are told (`app/prompt/script.py`)."""
    lacks: frozenset[str] = frozenset()
    """What some of its workers cannot do (`planes.wire.messages.EngineFacts`)."""
    digest: str = ""
    """Of the card that tokenizer and template come from: only workers of that card understand the tokens."""
    adapter: Adapter | None = None
    """What its workers change the model by."""


class Prepared(msgspec.Struct, frozen=True, eq=False):
    """A request that fits its model.

    tokens: the prompt, shape (n,), uint32, n >= 1.  blocks: names of its full blocks, under `cache_salt`.
    sampling: `max_tokens` resolved.  echo: the prompt's text if the client wants it back, else "".
    """

    tokens: Tokens
    blocks: Hashes
    sampling: Sampling
    cache_salt: str
    echo: str = ""


class Preprocessor:
    """Prepares requests for all models. Close it when the process ends."""

    def __init__(
        self,
        *,
        inline_bytes: int = DEFAULT_INLINE_BYTES,
        num_threads: int = 2,
        max_waiting: int = 1024,
        keeps_nonces: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:  inline_bytes: longest body whose prompt is tokenized on the event loop.  num_threads: long prompts
        tokenized at once.  max_waiting: long prompts under way, those on the threads included.
        keeps_nonces: render what `app/prompt/nonce.py` would drop.  clock: that of deadlines.
        """
        self._keeps_nonces = keeps_nonces
        self._clock = clock
        self._inline_bytes = inline_bytes
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
        self._free_threads = asyncio.Semaphore(num_threads)
        """Who waits, waits here: what an executor was given once it keeps, body and all, though nobody waits for it."""

    async def parse(self, parse: Callable[[bytes], Result], body: bytes, *, deadline: float | None = None) -> Result:
        """What `parse` makes of a body.  Raises:  what `parse` does; TokenizersBusy, PreparationTimeout."""
        return await self.run(parse, body, num_bytes=len(body), deadline=deadline)

    async def run(
        self, work: Callable[..., Result], *args: Any, num_bytes: int, deadline: float | None = None
    ) -> Result:
        """`work(*args)`, which looks at so many bytes.

        Raises:  what `work` does; TokenizersBusy, PreparationTimeout.
        """
        if self.is_short(num_bytes):
            return work(*args)
        return await self._on_thread(deadline, work, *args)

    async def prepare(
        self, parsed: ParsedRequest, model: ModelEntry, *, cache_salt: str | None = None, deadline: float | None = None
    ) -> Prepared:
        """
        Args:  cache_salt: instead of the request's own (see `Tenant.salted`).  deadline: on this object's clock.
        Raises:  InvalidRequest, ContextExceeded among them; TokenizersBusy, PreparationTimeout.
        """
        salt = parsed.cache_salt if cache_salt is None else cache_salt
        if self.is_short(parsed.num_bytes):
            return self.prepared(parsed, model, cache_salt=salt)
        return await self._on_thread(deadline, _prepared, self._stable(parsed), model, salt)

    def is_short(self, num_bytes: int) -> bool:
        """Whether a body of so many bytes is worked on at once, on the event loop."""
        return num_bytes <= self._inline_bytes

    def prepared(self, parsed: ParsedRequest, model: ModelEntry, *, cache_salt: str) -> Prepared:
        """As `prepare`, at once: of a short body.  Raises:  InvalidRequest, ContextExceeded among them."""
        return _prepared(self._stable(parsed), model, cache_salt)

    async def tokenize(
        self, parsed: ParsedRequest, model: ModelEntry, *, is_plain: bool = False, deadline: float | None = None
    ) -> Tokens:
        """The prompt's tokens, however many.

        Args:  is_plain: a text without what the model's configuration puts around it.
        Raises:  InvalidRequest, TokenizersBusy, PreparationTimeout.
        """
        parsed = self._stable(parsed)
        work = partial(_prompt_tokens, is_plain=is_plain)
        return await self.run(work, parsed, model, num_bytes=parsed.num_bytes, deadline=deadline)

    def close(self) -> None:
        """Waits for prompts that are being tokenized; those that wait for a thread are cancelled."""
        self._threads.shutdown(cancel_futures=True)

    def _stable(self, parsed: ParsedRequest) -> ParsedRequest:
        """The request without what only keeps its prompt from being found in a cache."""
        if self._keeps_nonces:
            return parsed
        messages = without_nonce(parsed.messages)
        return parsed if messages is parsed.messages else msgspec.structs.replace(parsed, messages=messages)

    async def _on_thread(self, deadline: float | None, work: Callable[..., Result], *args: Any) -> Result:
        if self._num_waiting >= self._max_waiting:
            raise TokenizersBusy(self._num_waiting, self._max_waiting)
        self._num_waiting += 1
        loop, has_begun = asyncio.get_running_loop(), False
        try:
            async with asyncio.timeout(None if deadline is None else deadline - self._clock()):
                await self._free_threads.acquire()
                running, has_begun = self._threads.submit(work, *args), True
                running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._ended))
                return await asyncio.wrap_future(running)
        except TimeoutError:
            raise PreparationTimeout from None
        finally:
            if not has_begun:
                self._num_waiting -= 1

    def _ended(self) -> None:
        """Work on a thread is done, whether or not somebody still waits for it."""
        self._num_waiting -= 1
        self._free_threads.release()


def _prepared(parsed: ParsedRequest, model: ModelEntry, salt: str) -> Prepared:
    """May run on a thread."""
    if parsed.sampling.n > model.max_batch:
        raise InvalidRequest(
            f"Invalid 'n': {parsed.sampling.n} choices were asked for and the workers of '{model.model}' run "
            f"{model.max_batch} sequences at once.",
            param="n",
        )
    _check_ids(parsed.sampling, model)
    tokens = _prompt_tokens(parsed, model)
    if parsed.truncate_prompt_tokens is not None:
        tokens = _truncated(tokens, parsed, model)
    sampling = msgspec.structs.replace(parsed.sampling, max_tokens=_max_tokens(len(tokens), parsed, model))
    if parsed.bad_words:
        sampling = msgspec.structs.replace(sampling, bad_words=_bad_words(parsed.bad_words, model.tokenizer))
    return Prepared(
        tokens=tokens,
        blocks=blocks.name_blocks(tokens, model.block_size, _root(model, salt)),
        sampling=sampling,
        cache_salt=salt,
        echo=_echo(parsed, model) if parsed.echo else "",
    )


def _root(model: ModelEntry, salt: str) -> int:
    return blocks.root(model.model, salt, "" if model.adapter is None else model.adapter.tag)


def _prompt_tokens(parsed: ParsedRequest, model: ModelEntry, *, is_plain: bool = False) -> Tokens:
    """May run on a thread."""
    if parsed.kind.is_conversation:
        return _chat_tokens(parsed, model)
    if isinstance(parsed.prompt, str):
        _check_provable(len(parsed.prompt), parsed, model)
        encode = model.tokenizer.encode_text if is_plain else model.tokenizer.encode_prompt
        return encode(parsed.prompt)
    check_vocabulary(_field(parsed), int(parsed.prompt.max()), model)
    return parsed.prompt


def _chat_tokens(parsed: ParsedRequest, model: ModelEntry) -> Tokens:
    if model.template is None:
        raise InvalidRequest(
            f"The model '{model.model}' has no chat template; use /v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    kwargs = parsed.template_kwargs
    if parsed.tools or parsed.documents:
        kwargs = {**(kwargs or {}), "tools": list(parsed.tools) or None, "documents": list(parsed.documents) or None}
    is_reply, is_continued = parsed.is_reply, parsed.is_continued
    try:
        segments = model.template.render(parsed.messages, kwargs, is_reply=is_reply, is_continued=is_continued)
    except TemplateError:
        messages = with_object_arguments(parsed.messages)
        if messages is None:
            raise
        segments = model.template.render(messages, kwargs, is_reply=is_reply, is_continued=is_continued)
    _check_provable(sum(len(segment.text) for segment in segments), parsed, model)
    return model.tokenizer.encode_segments(segments)


def with_object_arguments(messages: Sequence[dict[str, Json]]) -> list[dict[str, Json]] | None:
    """The messages for a template that fails on a call whose arguments are no object, which a model may have written.

    None: there is no such call.
    """
    found = False
    changed: list[dict[str, Json]] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        if any(isinstance(call["function"]["arguments"], str) for call in calls):
            found = True
            message = message | {"tool_calls": [_with_object(call) for call in calls]}  # noqa: PLW2901 - the changed one
        changed.append(message)
    return changed if found else None


def _with_object(call: dict[str, Json]) -> dict[str, Json]:
    arguments = call["function"]["arguments"]
    if not isinstance(arguments, str):
        return call
    return call | {"function": call["function"] | {"arguments": {"arguments": arguments}}}


def _truncated(tokens: Tokens, parsed: ParsedRequest, model: ModelEntry) -> Tokens:
    """The prompt's last tokens."""
    keep = parsed.truncate_prompt_tokens or 0
    if keep == -1:
        keep = max(1, model.context_length - _room_needed(parsed))
    return tokens[-keep:]


def _room_needed(parsed: ParsedRequest) -> int:
    """Tokens of the context that the prompt must leave; a vector takes none."""
    return 0 if parsed.kind is Kind.EMBEDDING else parsed.max_tokens or 1


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """As vLLM reads them: also with a space in front, where that makes as many tokens that begin otherwise."""
    found: list[list[int]] = []
    for word in words:
        plain, spaced = ([*map(int, tokenizer.encode_text(start + word.lstrip()))] for start in ("", " "))
        if not plain:
            raise InvalidRequest(f"Invalid 'bad_words': {word!r} has no tokens.", param="bad_words")
        found.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return found


def _check_provable(num_chars: int, parsed: ParsedRequest, model: ModelEntry) -> None:
    """Refuse a text that has too many tokens however it is cut."""
    if parsed.truncate_prompt_tokens is not None:
        return
    per_token, needed = model.tokenizer.max_chars_per_token, 0 if parsed.kind is _EMBEDDING else 1
    if per_token is not None and (at_least := -(-num_chars // per_token)) + needed > model.context_length:
        raise ContextExceeded(
            f"This model's maximum context length is {model.context_length} tokens. However, your prompt has "
            f"{num_chars} characters, which are at least {at_least} tokens. Please reduce its length.",
            param=_field(parsed),
        )


def _max_tokens(num_tokens: int, parsed: ParsedRequest, model: ModelEntry) -> int:
    """What the client asked for, or all the room there is.

    Anthropic's `max_tokens` has to be there and is a bound, which agents set once for all their prompts: what is beyond
    the context is its makers' case `model_context_window_exceeded`, which the answer tells.
    """
    context, field = model.context_length, _field(parsed)
    if not num_tokens:
        raise InvalidRequest(f"Invalid '{field}': it has no tokens; send at least one.", param=field)
    room = context - num_tokens
    if parsed.kind is _EMBEDDING:
        if room < 0:
            raise ContextExceeded(
                f"This model's maximum context length is {context} tokens. However, your input has {num_tokens} "
                "tokens. Please reduce its length.",
                param=field,
            )
        return 1
    if room < 1:
        raise ContextExceeded(
            f"This model's maximum context length is {context} tokens. However, your prompt has {num_tokens} tokens, "
            "which leaves no room for a completion. Please reduce its length.",
            param=field,
        )
    if parsed.max_tokens is not None and parsed.max_tokens > room and parsed.kind is not Kind.MESSAGE:
        raise ContextExceeded(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{num_tokens + parsed.max_tokens} tokens ({num_tokens} in the {field}, {parsed.max_tokens} in the "
            f"completion). Please reduce the {field} or the completion.",
            param=field,
        )
    if parsed.sampling.min_tokens > room:
        raise InvalidRequest(
            f"Invalid 'min_tokens': {parsed.sampling.min_tokens} is out of range; the prompt leaves room for {room}.",
            param="min_tokens",
        )
    return room if parsed.max_tokens is None else min(parsed.max_tokens, room)


def _check_ids(sampling: Sampling, model: ModelEntry) -> None:
    for field, ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
        if ids:
            check_vocabulary(field, max(ids), model)


def check_vocabulary(field: str, largest: int, model: ModelEntry) -> None:
    """Token ids outside the vocabulary would index past the engine's embeddings and logits."""
    if largest >= model.vocab_size:
        raise InvalidRequest(
            f"Invalid '{field}': token id {largest} is not in the vocabulary, which ends at {model.vocab_size - 1}.",
            param=field,
        )


def _echo(parsed: ParsedRequest, model: ModelEntry) -> str:
    return parsed.prompt if isinstance(parsed.prompt, str) else model.tokenizer.decode(parsed.prompt)


def _field(parsed: ParsedRequest) -> str:
    return _FIELD[parsed.kind]
