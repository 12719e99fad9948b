"""What decoding can raise of bytes that somebody else made: a peer, a client, whoever can write to etcd or to NATS."""

from typing import Final

import msgspec

UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""RecursionError: fields that nobody knows are read over however deeply they are nested."""
