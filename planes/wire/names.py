"""Which names may stand in an etcd key or a NATS subject."""

import re
from urllib.parse import quote

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_namespace(namespace: str) -> str:
    """Raises:  ValueError unless it can stand as it is in etcd keys, NATS subjects, stream and bucket names."""
    if _NAMESPACE.fullmatch(namespace) is None:
        raise ValueError(f"namespace {namespace!r} must be 1 to 64 of the characters A-Z a-z 0-9 _ -")
    return namespace


def subject_token(name: str) -> str:
    """Any text as one token of a NATS subject or a consumer name; different texts give different tokens."""
    return quote(name, safe="").replace(".", "%2E") or "%"
