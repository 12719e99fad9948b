"""What etcd says of LoRA adapters."""

import msgspec
import structlog

from planes.wire.messages import Adapter
from planes.wire.unreadable import UNREADABLE

_log = structlog.get_logger()


def read_adapter(name: str, value: bytes | None) -> Adapter | None:
    """What stands under a name (`planes.entries.ADAPTERS`); None: nothing, or what cannot be read, which is logged."""
    if value is None:
        return None
    try:
        return msgspec.json.decode(value, type=Adapter)
    except UNREADABLE as exc:
        _log.warning("adapter.malformed", adapter=name, reason=str(exc))
        return None
