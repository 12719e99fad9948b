"""The README's lines for containers, word for word, and the fleet that `make docker-up` starts."""

import os
import re

import pytest

from loadtest.processes import free_port
from tests.docker.commands import PATIENCE_S, ROOT, docker, run

BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
NAMES = ("etcd", "nats", "gateway", "prefill", "decode")


def containers(*filters: str) -> list[str]:
    return docker("ps", "-a", "--format={{.Names}}", *(f"--filter={each}" for each in filters)).split()


def test_the_lines_of_the_readme_start_a_fleet_ask_it_and_take_it_away(images):
    assert not {*NAMES} & {*containers()}, "containers of these names are there, and are not this test's"
    (lines,) = [block for block in BLOCKS if "docker network create" in block]
    try:
        told = run("bash", "-exc", lines, patience_s=5 * PATIENCE_S)
        assert told.returncode == 0, told.stdout
        assert "data: [DONE]" in told.stdout
        assert '"finish_reason":"' in told.stdout
        assert not {*NAMES} & {*containers()}
    finally:
        run("docker", "rm", "--force", *NAMES)
        run("docker", "network", "rm", "headrace")


@pytest.fixture
def composed(images):
    """What `make docker-up` says, and the environment of a project of its own."""
    project = {"COMPOSE_PROJECT_NAME": "headrace-test-compose", "PORT": str(free_port()), "FLAVOR": "sim"}
    environ = os.environ | project
    try:
        yield run("make", "docker-up", env=environ, patience_s=5 * PATIENCE_S), environ
    finally:
        down = ("docker", "compose", "-f", "docker/compose.yaml", "--profile", "*", "down", "--volumes")
        assert run(*down, env=environ).returncode == 0


def test_one_command_gets_from_nothing_to_an_answer_with_compose(composed):
    up, environ = composed
    assert up.returncode == 0, up.stdout
    assert re.search(r"prefill-\w+.*decode-\w+", up.stdout), up.stdout
    mine = f"label=com.docker.compose.project={environ['COMPOSE_PROJECT_NAME']}"
    assert len(containers(mine)) == 5
    assert len(containers(mine, "health=healthy")) == 5
    down = run("make", "docker-down", env=environ)
    assert down.returncode == 0, down.stdout
    assert containers(mine) == []


def test_every_profile_of_the_compose_file_is_one_that_compose_understands():
    for profile in ("sim", "cpu", "cuda", "observability"):
        told = run("docker", "compose", "-f", "docker/compose.yaml", "--profile", profile, "config")
        assert told.returncode == 0, told.stdout
    assert "device_ids" in run("docker", "compose", "-f", "docker/compose.yaml", "--profile", "cuda", "config").stdout
