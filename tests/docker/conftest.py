"""For tests that need a Docker daemon: `make docker-test`, or pytest with this folder's name."""

import pytest

from tests.docker.commands import Fleet, run


def pytest_ignore_collect(config):
    return None if any("tests/docker" in argument for argument in config.args) else True


@pytest.fixture(scope="session")
def images():
    """Ours, built as an operator builds them."""
    built = run("make", "docker", "FLAVOR=sim", patience_s=900)
    assert built.returncode == 0, built.stdout
    return ("headrace/etcd", "headrace/nats", "headrace/gateway", "headrace/worker:sim")


@pytest.fixture(scope="module")
def fleet(images):
    """etcd, NATS, a gateway, a prefill and two decode workers."""
    with Fleet() as fleet:
        fleet.start_planes()
        fleet.start_gateway(options=("--read-only", "--cap-drop=ALL"))
        fleet.start_worker("prefill")
        fleet.start_worker("decode", 1)
        fleet.start_worker("decode", 2)
        fleet.wait_for("prefill-1", "decode-1", "decode-2")
        yield fleet
