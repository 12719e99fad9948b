"""What is kept on this machine between starts."""

import os
from pathlib import Path

DEMO_MODEL = "gemma-3-270m"
"""What clients call the model that is served when nobody names one (`workers/demo_model/convert.py`)."""


def cache_dir() -> Path:
    """`$HEADRACE_CACHE`, else `~/.cache/headrace`. It may not exist yet."""
    return Path(os.environ.get("HEADRACE_CACHE") or Path.home() / ".cache" / "headrace")
