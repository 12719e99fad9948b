"""The arrows of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "router", "workers", "planes", "process")
MAY_IMPORT = {
    "app": {"app", "router", "planes", "process"},
    "router": {"router", "planes"},
    "workers": {"workers", "planes", "process"},
    "planes": {"planes"},
    "process": {"process", "planes"},
}
CLI_KNOWS = ("workers.settings.", "workers.adopted.settings.")
"""The command line starts workers, so it may know what they can be told (ADR 16); nothing else in app/ may."""
ROUTER_PLANES = {"planes.wire"}
PLANES = ("control", "events", "streams")
"""None may take another one down."""
IMPURE = {
    "aiofiles",
    "anyio",
    "asyncio",
    "concurrent",
    "datetime",
    "http",
    "io",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "requests",
    "secrets",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "structlog",
    "subprocess",
    "threading",
    "time",
    "urllib",
}
ONLY_IN = {
    "vllm": {"workers/vllm/"},
    "nixl": set(),  # loaded by the name of the wheel that is there, in workers/sim/transfer and workers/vllm/plugin
    "nixl_cu12": set(),
    "nixl_cu13": set(),
    "aetcd": {"planes/control"},
    "opentelemetry": {"app/telemetry/tracing"},
    "cryptography": {"app/cli/"},
    "nats": {"planes/events"},
    "torch": {"workers/"},
    "transformers": {"workers/"},
}

ON_THE_LOOP_S_CLOCK = {
    "planes/control.py": "moves the end of an `asyncio.timeout`, which is an instant on it",
    "workers/sim/engine.py": "simulates: every instant is on it, as those of steps go to `call_at`",
    "workers/sim/transfer.py": "lingers for a time, and tells it nobody",
}


def modules():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    """Full names of what a module imports anywhere, with line numbers; `from a import b` counts as a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*package, node.module] if node.module else package)
            else:
                base = node.module
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def test_the_packages_are_there():
    assert len(modules()) > 40


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_along_the_arrows(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name, line in imports(path)
        if (top := name.split(".")[0]) in {*PACKAGES, "loadtest", "tests"} and top not in MAY_IMPORT[package]
        if not (path.is_relative_to(ROOT / "app" / "cli") and f"{name}.".startswith(CLI_KNOWS))
    ]
    assert not wrong


def test_the_router_sees_only_the_values_of_the_planes():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / "router").rglob("*.py"))
        for name, line in imports(path)
        if name.startswith("planes")
        and not any(name == allowed or name.startswith(f"{allowed}.") for allowed in ROUTER_PLANES)
    ]
    assert not wrong


@pytest.mark.parametrize("plane", PLANES)
def test_the_planes_do_not_know_each_other(plane):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        if str(path.relative_to(ROOT)).startswith(f"planes/{plane}")
        for name, line in imports(path)
        if name.startswith("planes.") and name.split(".")[1] not in {plane, f"{plane}_client", "security", "wire"}
    ]
    assert not wrong


def test_the_router_is_pure():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / "router").rglob("*.py"))
        for name, line in imports(path)
        if name.split(".")[0] in IMPURE
    ]
    wrong += [
        f"{path.relative_to(ROOT)}:{node.lineno} has {type(node).__name__}"
        for path in sorted((ROOT / "router").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.Global)
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"open", "print", "input"}
        )
    ]
    assert not wrong


@pytest.mark.parametrize("library", ONLY_IN)
def test_each_foreign_library_has_one_home(library):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules()
        for name, line in imports(path)
        if name.split(".")[0] == library
        and not any(str(path.relative_to(ROOT)).startswith(home) for home in ONLY_IN[library])
    ]
    assert not wrong


@pytest.mark.parametrize("module", ["app.main", "app.cli", "router.router", "loadtest.simulate"])
def test_heavy_libraries_are_not_loaded_with(module):
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'vllm', 'nixl', 'nixl_cu12', 'nixl_cu13'} & sys.modules.keys()\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


NOT_IN_A_GATEWAY = {
    "aiohttp",
    "cryptography",
    "fastapi",
    "huggingface_hub",
    "loadtest",
    "opentelemetry",
    "pydantic",
    "tokenizers",
}
"""Each takes megabytes of every gateway's memory, and time before it listens."""


def test_a_gateway_loads_nothing_that_it_does_not_use():
    code = (
        "import sys, app.cli.commands, app.main\n"
        f"loaded = {NOT_IN_A_GATEWAY} & {{name.partition('.')[0] for name in sys.modules}}\n"
        "sys.exit(', '.join(sorted(loaded)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SECURED = {"Etcd": "security", "EventPlane": "security", "StreamServer": "keys", "WorkerConnection.open": "keys"}
"""What connects or listens, and the argument that says how it is secured. Tests may leave it out, processes may not."""


@pytest.mark.parametrize("package", ["app", "workers"])
def test_every_connection_is_secured_as_the_settings_say(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)} without {SECURED[ast.unparse(node.func)]}="
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in SECURED
        and SECURED[ast.unparse(node.func)] not in {keyword.arg for keyword in node.keywords}
    ]
    assert not wrong


def is_loop(node):
    """Whether an expression is an event loop, by its name."""
    name = node.func if isinstance(node, ast.Call) else node
    name = getattr(name, "attr", getattr(name, "id", ""))
    return name.strip("_") in {"loop", "get_running_loop", "get_event_loop"}


def test_no_time_is_taken_from_the_event_loop():
    """uvloop's clock counts whole milliseconds, and an instant on it may be compared with none of `time.monotonic`."""
    reading = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in {"time", "call_at"} and is_loop(node.value)
    }
    assert reading == set(ON_THE_LOOP_S_CLOCK)
