"""The README's lines for containers, word for word, and the fleet that `make docker-up` starts."""

import os
import re

import httpx
import pytest

from loadtest.processes import free_port
from tests.docker.commands import PATIENCE_S, ROOT, docker, run, wait_until

BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
NAMES = ("etcd", "nats", "gateway", "prefill", "decode")
COMPOSE = ("docker", "compose", "-f", "docker/compose.yaml")


def containers(*filters: str) -> list[str]:
    return docker("ps", "-a", "--format={{.Names}}", *(f"--filter={each}" for each in filters)).split()


def volumes() -> set[str]:
    return {*docker("volume", "ls", "-q").split()}


def test_the_lines_of_the_readme_start_a_fleet_ask_it_and_take_it_away(images):
    assert not {*NAMES} & {*containers()}, "containers of these names are there, and are not this test's"
    (lines,) = [block for block in BLOCKS if "docker network create" in block]
    own = {*re.findall(r"-v ([\w-]+):/", lines)} - volumes()
    try:
        told = run("bash", "-exc", lines, patience_s=5 * PATIENCE_S)
        assert told.returncode == 0, told.stdout
        assert "data: [DONE]" in told.stdout
        assert '"finish_reason":"' in told.stdout
        assert not {*NAMES} & {*containers()}
        assert own <= volumes()
    finally:
        run("docker", "rm", "--force", *NAMES)
        run("docker", "network", "rm", "headrace")
        run("docker", "volume", "rm", *own)


@pytest.fixture
def project(images):
    """The environment of a compose project of its own."""
    ports = {name: str(free_port()) for name in ("PORT", "PROMETHEUS_PORT")}
    environ = os.environ | {"COMPOSE_PROJECT_NAME": "headrace-test-compose", "FLAVOR": "sim"} | ports
    try:
        yield environ
    finally:
        assert run(*COMPOSE, "--profile", "*", "down", "--volumes", env=environ).returncode == 0


def test_one_command_gets_from_nothing_to_an_answer_with_compose(project):
    up = run("make", "docker-up", env=project, patience_s=5 * PATIENCE_S)
    assert up.returncode == 0, up.stdout
    assert re.search(r"prefill-\w+.*decode-\w+", up.stdout), up.stdout
    mine = f"label=com.docker.compose.project={project['COMPOSE_PROJECT_NAME']}"
    assert len(containers(mine)) == 5
    assert len(containers(mine, "health=healthy")) == 5
    down = run("make", "docker-down", env=project)
    assert down.returncode == 0, down.stdout
    assert containers(mine) == []


@pytest.fixture
def prometheus():
    """Debian's, in an image."""
    image = "headrace-test/prometheus"
    dockerfile = "tests/docker/prometheus.Dockerfile"
    docker("build", "--network=host", "-q", "-t", image, "-f", dockerfile, "tests/docker", patience_s=300)
    yield image
    docker("rmi", image)


def test_prometheus_in_compose_is_awaited_and_scrapes_the_gateway_and_each_worker(prometheus, project):
    profiles = ("--profile", "sim", "--profile", "observability")
    services = ("gateway", "sim-prefill", "sim-decode", "prometheus")
    environ = project | {"PROMETHEUS_IMAGE": prometheus}
    up = run(*COMPOSE, *profiles, "up", "--wait", *services, env=environ, patience_s=5 * PATIENCE_S)
    assert up.returncode == 0, up.stdout
    api = f"http://127.0.0.1:{environ['PROMETHEUS_PORT']}/api/v1"

    def targets():
        found = httpx.get(f"{api}/targets").json()["data"]["activeTargets"]
        return sorted((each["labels"]["job"], each["health"]) for each in found)

    gateway, worker = ("headrace-gateway", "up"), ("headrace-worker", "up")
    wait_until(lambda: targets() == [gateway, worker, worker], targets)
    groups = httpx.get(f"{api}/rules").json()["data"]["groups"]
    assert {each["file"] for each in groups} == {"/etc/prometheus/alerts.yml"}


def test_every_profile_of_the_compose_file_is_one_that_compose_understands():
    for profile in ("sim", "cpu", "cuda", "observability"):
        told = run(*COMPOSE, "--profile", profile, "config")
        assert told.returncode == 0, told.stdout
    assert "device_ids" in run(*COMPOSE, "--profile", "cuda", "config").stdout
