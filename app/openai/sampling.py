"""The sampling parameters of a body, ranges checked, as the workers get them."""

from math import inf
from operator import attrgetter
from typing import Any, Final

import msgspec

from app.openai.bodies import CommonBody, PromptCacheOptions, StreamOptions
from app.openai.decode import check_count, check_range, shown
from app.openai.schema import NULL, Limits
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Sampling, StructuredOutput
from planes.wire.unreadable import UNREADABLE

_INT32: Final = 2**31 - 1
_UINT32: Final = 2**32 - 1
LEAST_MS, MOST_MS = 0.001, 86_400_000.0
"""Of any time that a client may set: the router's arithmetic is safe from a microsecond on, and a day is no limit."""
_PRIORITIES: Final = {
    "auto": None,
    "default": None,
    "scale": None,
    "flex": 10,
    "priority": -10,
    "fast": -10,
}
"""OpenAI's service tiers as classes; nobody gets ahead of their key (`app/auth.py`)."""
_GREEDY_BELOW: Final = 1e-5
"""vLLM's threshold."""
_CHOICES: Final = (
    *("n", "seed", "top_p", "top_k", "min_p", "logit_bias", "stop", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_logprobs", "thinking_token_budget"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
"""All that a body may say of sampling beside the temperature. Most say none of it, which is seen at a glance."""
_chosen = attrgetter(*_CHOICES)
_UNCHOSEN: Final = (None,) * len(_CHOICES)


def parse_sampling(
    body: CommonBody,
    limits: Limits,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    structured: StructuredOutput | None = None,
) -> Sampling:
    """`max_tokens` stays 0 in the result (see `ParsedRequest`); it is given to check `min_tokens` against.

    Args:  structured: what the body's fields about that come to, or its tools.
    Raises:  InvalidRequest for a value out of range.
    """
    temperature = _within("temperature", body.temperature, 1.0, 0.0, 2.0)
    if logprobs is None and structured is None and _chosen(body) == _UNCHOSEN:
        return Sampling(max_tokens=0, temperature=temperature)
    n = 1 if body.n is None else body.n
    check_range("n", n, 1, limits.num_choices)
    top_p = 1.0 if body.top_p is None else body.top_p
    check_range("top_p", top_p, 0.0, 1.0)
    repetition_penalty = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    check_range("repetition_penalty", repetition_penalty, 0.0, inf, is_low_open=True)
    top_k = 0 if body.top_k is None else body.top_k
    check_range("top_k", top_k, -1, _INT32)
    if top_p == 0:
        top_p, top_k = 1.0, 1  # no probability mass is the likeliest token alone; engines want more than 0
    if n > 1 and temperature < _GREEDY_BELOW:
        temperature, top_p, top_k = 1.0, 1.0, 1  # engines take several choices only of what is drawn
    if body.seed is not None:
        check_range("seed", body.seed, -(2**63), 2**63 - 1)
    if logprobs is not None:
        check_range("logprobs", logprobs, 0, limits.num_logprobs)
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is not None:
        check_range("prompt_logprobs", prompt_logprobs, 0, limits.num_logprobs)
        if body.stream:
            raise InvalidRequest(
                "'prompt_logprobs' is not supported here together with 'stream': true; leave one out.",
                param="prompt_logprobs",
                code="unsupported_parameter",
            )
    return Sampling(
        max_tokens=0,
        min_tokens=_min_tokens(body.min_tokens, max_tokens),
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),  # -1 is vLLM's other word for "all tokens"
        min_p=_within("min_p", body.min_p, 0.0, 0.0, 1.0),
        presence_penalty=_within("presence_penalty", body.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_within("frequency_penalty", body.frequency_penalty, 0.0, -2.0, 2.0),
        repetition_penalty=repetition_penalty,
        seed=body.seed,
        stop=parse_stop("stop", body.stop, limits) if body.stop is not None else [],
        stop_token_ids=_stop_token_ids(body.stop_token_ids, limits) if body.stop_token_ids else [],
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        n=n,
        logit_bias=_logit_bias(body.logit_bias, limits) if body.logit_bias else {},
        structured=structured,
        prompt_logprobs=prompt_logprobs,
        thinking_tokens=_thinking_tokens(body.thinking_token_budget),
        is_stop_included=bool(body.include_stop_str_in_output),
        is_special_skipped=body.skip_special_tokens is not False,
    )


def parse_max_tokens(name: str, value: int | None) -> int | None:
    """Raises:  InvalidRequest below 1; the upper limit is the context, which `app/prompt/prepare.py` knows."""
    if value is not None:
        check_range(name, value, 1, inf)
    return value


def parse_stream_options(options: StreamOptions | None, *, is_streaming: bool) -> tuple[bool, bool]:
    """Whether the stream ends with the usage, and whether every event tells it so far.  Raises:  InvalidRequest."""
    if options is None:
        return False, False
    if not is_streaming:
        raise InvalidRequest(
            "Invalid 'stream_options': it is allowed only together with 'stream': true.", param="stream_options"
        )
    # As in vLLM, who wants it all along wants it at the end too.
    return bool(options.include_usage), bool(options.include_usage and options.continuous_usage_stats)


def parse_prewarm(options: PromptCacheOptions | None) -> bool:
    """Whether the prompt alone is to be computed."""
    return options is not None and bool(options.prewarm)


def parse_seconds(name: str, value_ms: float | None) -> float | None:
    """Milliseconds on the wire, seconds inside.  Raises:  InvalidRequest outside of `LEAST_MS` to `MOST_MS`."""
    if value_ms is None:
        return None
    check_range(name, value_ms, LEAST_MS, MOST_MS)
    return value_ms / 1000


def parse_priority(value: int | None, tier: str | None = None) -> int | None:
    """A class; `tier`, OpenAI's word, stands for one where none is given.

    Raises:  InvalidRequest outside -1000..1000, and for an unknown tier.
    """
    if tier is not None and tier not in _PRIORITIES:
        raise InvalidRequest(
            f"Invalid 'service_tier': {shown(tier)} is not one of {', '.join(_PRIORITIES)}.", param="service_tier"
        )
    if value is None:
        return None if tier is None else _PRIORITIES[tier]
    check_range("priority", value, -1000, 1000)
    return value


def parse_truncation(value: int | None) -> int | None:
    """Raises:  InvalidRequest for what is neither -1 nor a number of tokens."""
    if value is not None and value != -1:
        check_range("truncate_prompt_tokens", value, 1, inf)
    return value


def parse_bad_words(words: list[str] | None, limits: Limits) -> tuple[str, ...]:
    """Raises:  InvalidRequest for one that is empty or long, or too many."""
    if not words:
        return ()
    check_count("bad_words", len(words), limits.num_bad_words, "bad words")
    for word in words:
        if not word.strip():
            raise InvalidRequest("Invalid 'bad_words': a bad word must not be empty.", param="bad_words")
        check_count("bad_words", len(word), limits.stop_chars, "characters of one bad word")
    return tuple(words)


def parse_cache_salt(value: str | None) -> str:
    """Raises:  InvalidRequest for more than 256 characters."""
    salt = value or ""
    check_count("cache_salt", len(salt), 256, "characters")
    return salt


class Unsupported:
    """Refuses the fields of `unsupported` that a body uses. Built once per body type; the check is one C call."""

    def __init__(self, unsupported: dict[str, tuple[Any, ...]]) -> None:
        self._fields = unsupported
        self._values = attrgetter(*unsupported)

    def check(self, body: msgspec.Struct) -> None:
        """Raises:  InvalidRequest naming the first unsupported field."""
        values = self._values(body)
        if values.count(NULL) == len(values):
            return
        for (name, neutral), value in zip(self._fields.items(), values, strict=True):
            if not _asks_for_nothing(value, neutral):
                allowed = f"; leave it out or send {' or '.join(map(shown, neutral))}" if neutral else "; leave it out"
                raise InvalidRequest(
                    f"'{name}' is not supported here{allowed}. The value given is {shown(value)}.",
                    param=name,
                    code="unsupported_parameter",
                )


def _asks_for_nothing(value: msgspec.Raw, neutral: tuple[Any, ...]) -> bool:
    """Every neutral value is short, and only short values are looked at."""
    if value == NULL:
        return True
    if len(value) > 100:
        return False
    try:
        return msgspec.json.decode(value) in neutral
    except UNREADABLE:
        return False


def _within(name: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    check_range(name, value, low, high)
    return value


def _thinking_tokens(budget: int | None) -> int | None:
    """-1 is vLLM's word for no limit."""
    if budget is None or budget == -1:
        return None
    check_range("thinking_token_budget", budget, 0, _INT32)
    return budget


def _min_tokens(min_tokens: int | None, max_tokens: int | None) -> int:
    if min_tokens is None:
        return 0
    check_range("min_tokens", min_tokens, 0, _INT32 if max_tokens is None else max_tokens)
    return min_tokens


def parse_stop(name: str, stop: str | list[str], limits: Limits) -> list[str]:
    """Stop strings, in the field of this name.  Raises:  InvalidRequest for an empty one, too many, or too long."""
    strings = [stop] if isinstance(stop, str) else stop
    check_count(name, len(strings), limits.num_stop, "stop strings")
    for string in strings:
        if not string:
            raise InvalidRequest(f"Invalid '{name}': a stop string must not be empty.", param=name)
        check_count(name, len(string), limits.stop_chars, "characters of one stop string")
    return strings


def _stop_token_ids(tokens: list[int], limits: Limits) -> list[int]:
    check_count("stop_token_ids", len(tokens), limits.num_stop_token_ids, "token ids")
    for token in tokens:
        check_range("stop_token_ids", token, 0, _UINT32)
    return tokens


def _logit_bias(bias: dict[str, float], limits: Limits) -> dict[int, float]:
    check_count("logit_bias", len(bias), limits.num_logit_bias, "entries")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= _UINT32):
            raise InvalidRequest(f"Invalid 'logit_bias': the key {shown(key)} is not a token id.", param="logit_bias")
        check_range(f"logit_bias.{key}", value, -100.0, 100.0)
        checked[int(key)] = value
    return checked
