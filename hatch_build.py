"""Compiles what is hot while Headrace is being installed or packed; without a C compiler, plain Python serves.

- The block table, `router/index/block_table.c`, and the names of blocks, `planes/wire/block_names.c`: no Python
  extensions, they need no headers of Python.
- The modules in `COMPILED`, as they stand, by mypyc: in a wheel alone, and for the Python that builds it. In a working
  copy they would hide every edit of their sources.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_LIBRARIES = {
    "router/index/block_table.c": "router/index/libblock_table.so",
    "planes/wire/block_names.c": "planes/wire/libblock_names.so",
}
_FLAGS = ("-std=c99", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")  # -O2 takes half as long again to twice as long

COMPILED = (
    "router/cost.py",
    "router/fairness.py",
    "router/fleet.py",
    "router/index/untold.py",
    "router/late_binding.py",
    "router/latency.py",
    "router/links.py",
    "router/load.py",
    "router/policies/headrace.py",
    "router/prices.py",
    "router/queue.py",
    "router/router.py",
    "router/steps.py",
    "router/timeline.py",
    "router/worker.py",
)
"""What runs for each decision. Compiled code takes types for granted, and nobody may inherit from its classes: values
that others build or encode stay plain, and so does what judges a policy's answers (`decision.py`)."""

_GROUP = "router._compiled"
"""Their common library is `router/_compiled__mypyc…so`: not a name of its own beside other projects' packages."""
_MYPYC = """
import sys
from setuptools import Distribution
from mypyc.build import mypycify
out, group, *modules = sys.argv[1:]
extensions = mypycify(
    ["--config-file=", "--ignore-missing-imports", "--namespace-packages", *modules],
    opt_level="3", debug_level="0", group_name=group, target_dir=out + "/c",
)
command = Distribution({"name": "headrace", "ext_modules": extensions}).get_command_obj("build_ext")
command.build_lib, command.build_temp = out + "/lib", out + "/o"
command.ensure_finalized()
command.run()
"""


class CompilingHook(BuildHookInterface[Any]):
    """`CC` names another compiler than `cc`."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this platform. An editable install finds the library in the tree."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        for name in _LIBRARIES.values():
            (root / name).unlink(missing_ok=True)  # never a stale one
        for source, name in _LIBRARIES.items():
            problem = _compile(root / source, root / name)
            if problem:
                self.app.display_warning(f"the block index will be plain Python, several times slower: {problem}")
                return
            build_data["artifacts"].append(name)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"], build_data["tag"] = False, f"py3-none-{platform}"
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()
        modules, problem = _compile_modules(root, Path(self._folder.name))
        if problem:
            self.app.display_warning(f"the router will be plain Python, half as fast: {problem}")
            return
        build_data["force_include"].update(modules)
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build_data["tag"] = f"{python}-{python}-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel has what it needs of them."""
        del version, build_data, artifact_path
        folder = getattr(self, "_folder", None)
        if folder is not None:
            folder.cleanup()


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


def _compile_modules(root: Path, folder: Path) -> tuple[dict[str, str], str]:
    """Where each built file lies, and where in the wheel it belongs; or what went wrong.

    In a process of its own: mypyc prints what it does, and ends the process that calls it where a module is wrong.
    """
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return {}, "no headers of Python (apt-get install python3-dev)"
    argv = [sys.executable, "-c", _MYPYC, str(folder), _GROUP, *COMPILED]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        return {}, f"mypyc: {(done.stderr or done.stdout).strip()[-2000:]}"
    library = folder / "lib"
    return {str(path): str(path.relative_to(library)) for path in library.rglob("*.so")}, ""
