"""Docker's command line, and a fleet of containers that takes itself away again."""

import json
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import httpx

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
GRACE_S = 60
OPEN = {
    "HEADRACE_ETCD": "http://etcd:2379",
    "HEADRACE_NATS": "nats://nats:4222",
    "HEADRACE_INSECURE": "true",
}
LOCKED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=12345")


def run(*argv: str, patience_s: float = PATIENCE_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """Its output, both kinds of it, is in `stdout`."""
    return subprocess.run(
        argv,
        cwd=ROOT,
        text=True,
        timeout=patience_s,
        check=False,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options),
    )


def docker(*arguments: str, patience_s: float = PATIENCE_S) -> str:
    """What it prints; fails the test, with all that it said, if it fails."""
    done = run("docker", *arguments, patience_s=patience_s)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout}"
    return done.stdout.strip()


def inspected(name: str) -> dict[str, Any]:
    """A container or an image."""
    return json.loads(docker("inspect", name))[0]


def wait_until(holds, told) -> None:
    """Fails the test, with what `told` says, if it takes longer than anybody would wait."""
    give_up = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up, told()
        time.sleep(0.1)


class Fleet:
    """Containers in a network of their own. All names carry `mark`, and so does all that is taken away at the end."""

    def __init__(self) -> None:
        self.mark = f"headrace-test-{secrets.token_hex(4)}"

    def __enter__(self) -> Self:
        docker("network", "create", self.mark)
        return self

    def __exit__(self, *_: object) -> None:
        if left := self._containers():
            docker("rm", "--force", "--volumes", *left)
        docker("network", "rm", self.mark)
        if volumes := docker("volume", "ls", "-q", "--filter", f"name={self.mark}").split():
            docker("volume", "rm", *volumes)
        assert self._containers() == []

    def _containers(self) -> list[str]:
        return docker("ps", "-aq", "--filter", f"label={self.mark}").split()

    def name(self, of: str) -> str:
        return f"{self.mark}-{of}"

    def start(self, of: str, image: str, *command: str, options: tuple[str, ...] = (), **variables: str) -> None:
        """A container that others know as `of`."""
        names = (
            "--name",
            self.name(of),
            "--network",
            self.mark,
            "--network-alias",
            of,
            "--label",
            self.mark,
            "--health-interval=1s",
        )
        settings = [f"--env={name}={value}" for name, value in (OPEN | variables).items()]
        docker("run", "--detach", *names, *settings, *options, image, *command)

    def start_planes(self) -> None:
        for plane in ("etcd", "nats"):
            self.start(plane, f"headrace/{plane}", options=(f"--volume={self.name(plane)}:/data",))

    def start_worker(self, role: str, number: int = 1, *, options: tuple[str, ...] = (), **variables: str) -> None:
        worker = f"{role}-{number}"
        flags = ("--role", role, "--worker-id", worker, "--sim-answer-tokens", "0")
        self.start(worker, "headrace/worker:sim", *flags, options=options, **variables)

    def start_gateway(self, of: str = "gateway", *, options: tuple[str, ...] = (), **variables: str) -> None:
        self.start(of, "headrace/gateway", options=("--publish=127.0.0.1::8000", *options), **variables)

    def log(self, of: str) -> str:
        return docker("logs", self.name(of))

    def exit_code(self, of: str) -> int:
        return inspected(self.name(of))["State"]["ExitCode"]

    def stop(self, of: str) -> int:
        """As an operator does, who gives it time for its drain.  Returns:  its exit status."""
        docker("stop", f"--time={GRACE_S}", self.name(of))
        return self.exit_code(of)

    def wait_healthy(self, of: str) -> None:
        """As Docker sees it."""
        wait_until(
            lambda: inspected(self.name(of))["State"]["Health"]["Status"] == "healthy",
            lambda: f"{of}: {inspected(self.name(of))['State']}\n{self.log(of)}",
        )

    @property
    def url(self) -> str:
        """The gateway's, which is another each time that it starts."""
        return f"http://{docker('port', self.name('gateway'), '8000').splitlines()[0]}"

    def wait_for(self, *workers: str) -> None:
        """Until the gateway knows just these."""

        def known() -> set[str]:
            try:
                fleet = httpx.get(f"{self.url}/v1/fleet", timeout=5.0).json()
            except httpx.HTTPError:
                return set()
            return {each["worker"] for each in fleet["workers"] if each["is_connected"]}

        wait_until(
            lambda: known() == set(workers), lambda: f"{known()} are there, not {workers}\n{self.log('gateway')}"
        )
