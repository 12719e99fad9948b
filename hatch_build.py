"""Compiles the block table while Headrace is being installed or packed; without a C compiler, plain Python serves.

The library is no Python extension: it needs no headers of Python, and a wheel with it serves every Python 3.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCE, _LIBRARY = "router/index/block_table.c", "router/index/libblock_table.so"
_FLAGS = ("-std=c99", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")  # -O2 takes half as long again to twice as long


class BlockTableHook(BuildHookInterface[Any]):
    """`CC` names another compiler than `cc`."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this platform. An editable install finds the library in the tree."""
        del version
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        library = root / _LIBRARY
        library.unlink(missing_ok=True)  # never a stale one
        problem = _compile(root / _SOURCE, library)
        if problem:
            self.app.display_warning(f"the block index will be plain Python, several times slower: {problem}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(_LIBRARY)
        build_data["pure_python"], build_data["tag"] = False, f"py3-none-{platform}"


def _compile(source: Path, library: Path) -> str:
    """What went wrong, if anything."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return "no C compiler (cc)"
    unfinished = library.with_suffix(".tmp")
    try:
        subprocess.run(
            [*compiler.split(), *_FLAGS, str(source), "-o", str(unfinished)], check=True, capture_output=True, text=True
        )
        unfinished.replace(library)
    except subprocess.CalledProcessError as exc:
        return f"{compiler}: {exc.stderr.strip()}"
    except OSError as exc:
        return f"{compiler}: {exc}"
    return ""
