"""Which of NIXL's wheels is installed. There is one for each version of CUDA, each under a name of its own."""

import importlib.util
from collections.abc import Callable
from typing import Any

WHEELS = {"13": "nixl_cu13", "12": "nixl_cu12"}
"""By the major version of CUDA. Both work without CUDA."""


def installed_wheel(
    cuda_version: str | None = None, *, find: Callable[[str], Any] = importlib.util.find_spec
) -> str | None:
    """The module's name: the wheel for this version of CUDA, else the newest; None if there is none.

    Args:  cuda_version: torch's, such as 13.0; None on CPU.
    """
    fitting = WHEELS.get((cuda_version or "").partition(".")[0])
    names = [fitting, *WHEELS.values()] if fitting else list(WHEELS.values())
    return next((name for name in names if find(name) is not None), None)
