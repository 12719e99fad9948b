"""Ids of what an answer consists of. They follow from the answer's own, so that every worker gives the same ones."""

import hashlib


def call_id(response_id: str, choice: int, call: int) -> str:
    """Of a tool call."""
    return item_id("call_", response_id, choice, call)


def item_id(prefix: str, response_id: str, *ordinals: int) -> str:
    """`prefix` and 24 hex digits."""
    name = ":".join([response_id, *map(str, ordinals)])
    return prefix + hashlib.blake2b(name.encode(), digest_size=12, person=prefix.encode()[:16]).hexdigest()
