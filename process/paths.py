"""What is kept on this machine between starts."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from planes.wire.errors import HeadraceError

DEMO_MODEL = "smollm2-135m"
"""What clients call the model that is served when nobody names one (`workers/demo_model/convert.py`)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class UnusableCache(HeadraceError):  # noqa: N818 - names what is wrong
    """The folder of HEADRACE_CACHE is none that can be used."""

    code = "unusable_cache"

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(f"HEADRACE_CACHE is {value!r}: {reason}")


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$HEADRACE_CACHE`, else `~/.cache/headrace`. It may not exist yet.  Raises:  UnusableCache."""
    named = environ.get("HEADRACE_CACHE")
    try:
        folder = Path(named).expanduser() if named else Path("~/.cache/headrace").expanduser()
    except RuntimeError as exc:  # this user has no home
        raise UnusableCache(named or "not set", f"there is no home folder ({exc}); name another") from exc
    if not folder.is_absolute():
        raise UnusableCache(named, "it must be an absolute path, so that it does not depend on the current folder")
    return folder


def is_hub_id(model: str) -> bool:
    """Whether it names a model at the Hugging Face hub, `org/name`: a directory of that name here goes first."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).is_dir()
