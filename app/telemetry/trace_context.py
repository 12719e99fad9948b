"""W3C trace context: which trace a request belongs to. https://www.w3.org/TR/trace-context/"""

import re
from typing import Final

from msgspec import Struct

TRACEPARENT: Final = "traceparent"
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED: Final = 1


class TraceContext(Struct, frozen=True):
    """trace_id: 32 hex digits.  parent: the client's span, 16 hex digits; empty: ours is the first."""

    trace_id: str
    parent: str = ""
    is_sampled: bool = True


def parse_traceparent(value: str) -> TraceContext | None:
    """None for what is no such header: the standard asks to go on as if it were not there."""
    found = _FORM.fullmatch(value.strip())
    if found is None:
        return None
    version, trace_id, parent, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(parent, 16):
        return None
    return TraceContext(trace_id, parent, bool(int(flags, 16) & _SAMPLED))
