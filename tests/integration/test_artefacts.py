"""What is published: wheel and sdist, each installed with its dependencies into an environment that has nothing else.

Everything else is tested from the tree, where no file can be missing.
"""

import ast
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import httpx
import pytest

from loadtest.processes import free_port
from tests.up import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def environment(**added):
    """Ours, without what would let the tree itself be imported or set Headrace."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HEADRACE_", "VIRTUAL"))
    }
    return kept | added


def call(*argv, cwd, **added):
    done = subprocess.run(argv, cwd=cwd, env=environment(**added), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install(kind, folder):
    """The bin folder of a new virtual environment that has what was built, and nothing of the tree.

    The wheel is built from the sdist: built in the tree, it would compile the block table under the other tests' feet.
    The sdist is installed as on a machine that has no C compiler.
    """
    steps, added = (["--sdist"], {"CC": str(folder / "no-compiler")}) if kind == "tar.gz" else ([], {})
    call(sys.executable, "-m", "build", *steps, "--outdir", folder / "dist", ROOT, cwd=folder)
    (artefact,) = (folder / "dist").glob(f"*.{kind}")
    call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    call(folder / "venv/bin/pip", "install", "--quiet", f"{artefact}[sim]", cwd=folder, **added)
    return folder / "venv/bin"


def has_python_headers():
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def compiled_in(installed):
    """The modules under a folder that are compiled, as their sources are called."""
    libraries = [path.relative_to(installed) for path in (installed / "router").rglob("*.cpython-*.so")]
    return {str(path.parent / f"{path.name.split('.')[0]}.py") for path in libraries if "__mypyc" not in path.name}


def compiled_by_wheels():
    """What `hatch_build.py` names."""
    tree = ast.parse((ROOT / "hatch_build.py").read_text(encoding="utf-8"))
    (names,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILED"
    )
    return set(ast.literal_eval(names))


def try_compiled(installed, folder):
    """The router's tests and the simulator's, which are run from the tree anyway, with what is installed."""
    for name in ("tests", "loadtest"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "node*", "e2e"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    code = "import router.cost, sys; sys.exit(router.cost.__file__.endswith('.py'))"
    call(sys.executable, "-c", code, cwd=folder, PYTHONPATH=str(installed))
    tests = ("tests/unit/router", "tests/unit/loadtest/simulator", "--ignore=tests/unit/router/index")
    argv = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    call(*argv, cwd=folder, PYTHONPATH=str(installed))


def files_of(folder):
    """What belongs to our packages under a folder, except what Python and the C compiler make."""
    return {
        path.relative_to(folder)
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so", ".tmp"}
    }


@pytest.fixture
def somebody_elses_project(tmp_path):
    """A folder to work in that has packages with the names of ours; none of them may be touched."""
    folder = tmp_path / "project"
    for package in PACKAGES:
        (folder / package).mkdir(parents=True)
        for name in ("__init__.py", "__main__.py"):
            (folder / package / name).write_text(f"raise SystemExit('another project has {package}/{name}')\n")
    return folder


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
async def test_what_is_published_is_whole_and_serves_beside_packages_of_the_same_names(
    kind, tmp_path, somebody_elses_project, until
):
    commands = install(kind, tmp_path)

    (installed,) = (tmp_path / "venv/lib").glob("python3*/site-packages")
    assert files_of(installed) == files_of(ROOT)
    is_compiled = kind == "whl" and any(map(shutil.which, ("cc", "gcc", "clang")))
    for library in ("router/index/libblock_table.so", "planes/wire/libblock_names.so"):
        assert (installed / library).exists() == is_compiled
    has_router = is_compiled and has_python_headers()
    assert compiled_in(installed) == (compiled_by_wheels() if has_router else set())
    if has_router:
        (tmp_path / "tests").mkdir()
        try_compiled(installed, tmp_path / "tests")

    version = call(commands / "headrace", "--version", cwd=somebody_elses_project)
    assert version.strip() == PROJECT["project"]["version"]

    port, output = free_port(), tmp_path / "output"
    flags = ("--engine", "sim", "--port", str(port), "--state-dir", tmp_path / "state")
    with output.open("wb") as file:
        running = await asyncio.create_subprocess_exec(
            *(commands / "headrace", "up", *flags),
            cwd=somebody_elses_project,
            env=environment(HEADRACE_SPEEDUP="10", HEADRACE_CACHE=str(tmp_path / "cache")),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:

        def is_listening():
            assert running.returncode is None, output.read_text()
            return "curl -N" in output.read_text()

        await until(is_listening, f"it listens: {output}")
        body = {"model": "sim", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=180, trust_env=False) as client:
            answer = await client.post("/v1/chat/completions", json=body, headers={"x-headrace-handover": "always"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8
        running.send_signal(signal.SIGINT)
        assert await running.wait() == 0, output.read_text()
    finally:
        if running.returncode is None:
            running.terminate()
            await running.wait()
