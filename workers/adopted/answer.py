"""What `vllm serve` says of a request, in our words: a fold over the chunks of its stream, or its one whole answer."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec

from planes.wire.frames import DecodeLeg, FinishReason
from workers.engine.base import EngineOutput, EngineRequest, TokenLogprob
from workers.vllm.request import is_greedy

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}
END = b"[DONE]"


class _Alternative(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    rank: int | None = None


class _Logprob(_Alternative, frozen=True):
    top_logprobs: list[_Alternative] = []


class _Logprobs(msgspec.Struct, frozen=True):
    content: list[_Logprob] | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens_details: _Details | None = None


class _OfPrompt(msgspec.Struct, frozen=True):
    logprob: float
    rank: int | None = None


class Error(msgspec.Struct, frozen=True):
    """code: an HTTP status; streams have begun with 200 when vLLM finds something out."""

    message: str = ""
    param: str | None = None
    code: int | str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """Also a whole answer, and a refusal."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    prompt_logprobs: list[dict[int, _OfPrompt] | None] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    error: Error | None = None


decode_chunk = msgspec.json.Decoder(Chunk, strict=False).decode
"""Not strict: the names of JSON's fields are texts, and prompts' log probabilities are by token."""


class OtherToken(Exception):  # noqa: N818 - names what has happened
    """The decode worker drew another token than the one that the client has: a near tie."""


async def events(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of a stream of server-sent events, cut anywhere."""
    rest = b""
    async for part in body:
        *whole, rest = (rest + part).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield event[6:]


class Answer:
    """Folds one request's chunks. Choice 0's ending is held back until the server has told how much was cached."""

    def __init__(self, request: EngineRequest, *, started_at: float, skipped: int | None = None) -> None:
        """skipped: a first token that the client has got already."""
        self._request = request
        self._started_at = started_at
        self._skipped = skipped
        self._first_at: float | None = None
        self._last_at = started_at
        self._cached_tokens = 0
        self._held: list[EngineOutput] = []
        self._unfinished = set(range(request.sampling.n))
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the server has said how each choice ended."""
        return not self._unfinished

    @property
    def has_begun(self) -> bool:
        return self._first_at is not None

    def feed(self, chunk: Chunk, *, now: float) -> list[EngineOutput]:
        """Raises:  OtherToken."""
        if chunk.prompt_logprobs:
            self._prompt_logprobs = _of_prompt(self._request, chunk.prompt_logprobs)
        if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
            self._cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens or 0
        outputs = [output for choice in chunk.choices for output in self._outputs(choice, now)]
        if not chunk.choices:
            outputs += self.ended()
        return outputs

    def ended(self) -> list[EngineOutput]:
        """What was held back."""
        held, self._held = self._held, []
        return [self._measured(output) for output in held]

    def _outputs(self, choice: _Choice, now: float) -> list[EngineOutput]:
        is_first = self._first_at is None and choice.index == 0
        self._first_at = now if self._first_at is None else self._first_at
        self._last_at = now
        tokens = tuple(choice.token_ids or ())
        logprobs = _logprobs(choice, self._request.sampling.logprobs or 0)
        if self._skipped is not None and tokens:
            if tokens[0] != self._skipped:
                raise OtherToken
            tokens, logprobs, self._skipped = tokens[1:], logprobs[1:], None
        ending = choice.finish_reason
        finish = None if ending is None else _FINISH.get(ending, FinishReason.ERROR)
        if not tokens and finish is None:
            return []
        error = f"vLLM ended the request with {ending!r}" if finish is FinishReason.ERROR else ""
        outputs = []
        for index in range(self._request.sampling.n) if is_greedy(self._request.sampling) else (choice.index,):
            output = EngineOutput(index, tokens, logprobs, finish, error=error)
            if finish is not None:
                self._unfinished.discard(index)
            if index == 0 and finish is not None:
                self._held.append(output)
            else:
                outputs.append(self._measured(output) if is_first and index == 0 else output)
        return outputs

    def _measured(self, output: EngineOutput) -> EngineOutput:
        first_at = self._last_at if self._first_at is None else self._first_at
        waited_s = first_at - self._started_at
        is_decode = isinstance(self._request.leg, DecodeLeg)
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        return replace(
            output,
            cached_tokens=self._cached_tokens,
            prefill_s=0.0 if is_decode else waited_s,
            handover_s=waited_s if is_decode else 0.0,
            decode_s=self._last_at - first_at,
            prompt_logprobs=prompt_logprobs,
        )


def _logprobs(choice: _Choice, num_top: int) -> tuple[TokenLogprob, ...]:
    content = choice.logprobs.content if choice.logprobs is not None else None
    return tuple(
        TokenLogprob(entry.token_id, entry.logprob, _best(entry.top_logprobs, num_top), entry.rank)
        for entry in content or ()
    )


def _best(alternatives: list[_Alternative], num_top: int) -> tuple[tuple[int, float], ...]:
    top = sorted(((each.token_id, each.logprob) for each in alternatives), key=lambda pair: -pair[1])
    return tuple(top[:num_top])


def _of_prompt(request: EngineRequest, ranked: list[dict[int, _OfPrompt] | None]) -> tuple[TokenLogprob | None, ...]:
    num_top = request.sampling.prompt_logprobs or 0
    found: list[TokenLogprob | None] = []
    for token, entries in zip(request.prompt.tolist(), ranked, strict=True):
        if entries is None:
            found.append(None)
            continue
        top = sorted(((other, entry.logprob) for other, entry in entries.items()), key=lambda pair: -pair[1])
        found.append(TokenLogprob(token, entries[token].logprob, tuple(top[:num_top]), entries[token].rank))
    return tuple(found)
