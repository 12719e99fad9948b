"""What a request can say already and no worker does yet: refused by name. An entry goes when workers do it."""

from collections.abc import Callable
from typing import Final

from app.openai.schema import ParsedRequest
from planes.wire.errors import InvalidRequest

_UNSERVED: Final[dict[str, Callable[[ParsedRequest], bool]]] = {
    "prompt_logprobs": lambda parsed: parsed.sampling.prompt_logprobs is not None,
    "include_stop_str_in_output": lambda parsed: parsed.sampling.is_stop_included,
    "return_token_ids": lambda parsed: parsed.has_token_ids,
    "stream_options.continuous_usage_stats": lambda parsed: parsed.has_continuous_usage,
}


def refuse_unserved(parsed: ParsedRequest) -> None:
    """Raises:  InvalidRequest."""
    for name, is_asked in _UNSERVED.items():
        if is_asked(parsed):
            raise InvalidRequest(
                f"'{name}' is not supported here yet; leave it out.", param=name, code="unsupported_parameter"
            )
