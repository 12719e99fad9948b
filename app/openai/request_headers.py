"""What a client asks of the gateway beside OpenAI's body, in request headers.

| header                    | values              | meaning                                                       |
|---------------------------|---------------------|---------------------------------------------------------------|
| `x-headrace-handover`     | auto, always, never | prefill and decode on different workers: as is best, or not   |
| `x-headrace-explain`      | 0, 1                | send the chosen route and its predicted seconds as a header   |
| `x-headrace-slo-ttft-ms`  | milliseconds        | as `slo_ttft_ms` in the body, which goes before it            |
| `x-headrace-slo-itl-ms`   | milliseconds        | as `slo_itl_ms` in the body, which goes before it             |
| `x-headrace-script`       | JSON list of texts  | what the simulated engine says (`app/prompt/script.py`)       |
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.openai.sampling import LEAST_MS, MOST_MS
from planes.wire.errors import InvalidRequest
from router.request import HandoverPreference, Route

HANDOVER, EXPLAIN, ROUTE = "x-headrace-handover", "x-headrace-explain", "x-headrace-route"
SLO_TTFT, SLO_ITL = "x-headrace-slo-ttft-ms", "x-headrace-slo-itl-ms"
SCRIPT, IGNORED, OVERHEAD = "x-headrace-script", "x-headrace-ignored", "x-headrace-overhead-ms"
_OPTIONS = frozenset({HANDOVER, EXPLAIN, SLO_TTFT, SLO_ITL})
_MOST_IGNORED_CHARS = 512


def ignored_header(names: Sequence[str]) -> str:
    """The names of fields that nobody knows, and how many more there are."""
    told: list[str] = []
    length = 0
    for name in names:
        shown = name[:64].encode("unicode_escape").decode("ascii")
        length += len(shown) + 2
        if length > _MOST_IGNORED_CHARS:
            told.append(f"and {len(names) - len(told)} more")
            break
        told.append(shown)
    return ", ".join(told)


def overhead_header(overhead_s: float) -> tuple[str, str]:
    """What the gateway took itself, until the head was made."""
    return OVERHEAD, f"{overhead_s * 1000:.3f}"


@dataclass(frozen=True, slots=True)
class HeaderOptions:
    """is_explained: the answer's head has `x-headrace-route`."""

    handover: HandoverPreference = HandoverPreference.AUTO
    is_explained: bool = False
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None


NONE = HeaderOptions()


def parse_header_options(headers: Mapping[str, str], *, n: int, has_prompt_logprobs: bool = False) -> HeaderOptions:
    """The options in these headers (lower-case names), for an answer of `n` choices.  Raises:  InvalidRequest."""
    if _OPTIONS.isdisjoint(headers):
        return NONE
    handover = HandoverPreference(_one_of(headers, HANDOVER, tuple(HandoverPreference), HandoverPreference.AUTO))
    if handover is HandoverPreference.ALWAYS and n > 1:
        raise InvalidRequest(f"{HANDOVER} is 'always' and n is {n}: a handover serves one choice", param=HANDOVER)
    if handover is HandoverPreference.ALWAYS and has_prompt_logprobs:
        raise InvalidRequest(f"{HANDOVER} is 'always': log probabilities of a prompt take one worker", param=HANDOVER)
    is_explained = _one_of(headers, EXPLAIN, ("0", "1"), "0") == "1"
    return HeaderOptions(handover, is_explained, _seconds(headers, SLO_TTFT), _seconds(headers, SLO_ITL))


def route_header(route: Route) -> str:
    """What was chosen, its predicted seconds and what it gives up, as compact JSON in ASCII, well below 2 KiB."""
    chosen = route.predicted
    told = {
        "prefill": route.prefill,
        "decode": route.decode,
        "cached_tokens": route.cached_tokens,
        **{name: round(getattr(chosen, name), 6) for name in _SECONDS},
        "gives_up": chosen.gives_up,
        "held_s": round(route.held_s, 6),
        "candidates": route.num_candidates,
    }
    return json.dumps(told, separators=(",", ":"))


_SECONDS = ("queue_s", "prefill_s", "handover_s", "inflicted_s", "total_s")


def _one_of(headers: Mapping[str, str], name: str, allowed: Iterable[str], default: str) -> str:
    value = headers.get(name, default).strip()
    if value not in allowed:
        raise InvalidRequest(f"{name} is {value[:100]!r}; {', '.join(allowed)} are possible", param=name)
    return value


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    value = headers.get(name)
    if value is None:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if "_" in value or not value.isascii():  # Python takes "1_000" and other scripts' digits for numbers, too
        milliseconds = math.nan
    if not LEAST_MS <= milliseconds <= MOST_MS:
        raise InvalidRequest(
            f"{name} is {value.strip()[:100]!r}; a number of milliseconds from {LEAST_MS:g} to {MOST_MS:.0f} is "
            "possible",
            param=name,
        )
    return milliseconds / 1000
