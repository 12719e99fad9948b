"""What `--cors-origin` names."""

import re
from typing import Final

from planes.wire.errors import UnusableSetting

ANY: Final = "*"
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


def parse_origins(setting: str) -> frozenset[str]:
    """Of a list with commas.  Raises:  UnusableSetting."""
    origins = frozenset(each.strip() for each in setting.split(",") if each.strip())
    for origin in origins - {ANY}:
        if not _ORIGIN.fullmatch(origin):
            raise UnusableSetting(
                "cors_origin",
                origin,
                "an origin is * or scheme://host[:port], without a path, such as https://a.example",
            )
    return origins
