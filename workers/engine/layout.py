"""The compatibility hash of an engine's KV cache: who has another one could not read it, or would read nonsense."""

import hashlib
from collections.abc import Mapping

import msgspec


def layout_hash(facts: Mapping[str, object]) -> str:
    """16 hex digits over all that two engines must have in common to hand KV caches over. Equal facts, equal hashes.

    Args:  facts: texts, numbers and lists of them, by name.
    """
    return hashlib.sha256(msgspec.json.encode(dict(facts), order="deterministic")).hexdigest()[:16]
