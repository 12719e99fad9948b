"""Gateways and their workers as processes: begun, waited for, ended."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.cli.servers import etcd_server, nats_server
from loadtest.client import Client
from loadtest.closed_loop import CHAT, Target
from loadtest.peers.gateways import Gateway, Site, headrace_name
from loadtest.processes import Process, descendants, free_port
from loadtest.stack import stack
from process.programs import program
from workers.demo_model.convert import DemoModelError, ensure_demo_model
from workers.settings import SIM_MODEL

_PATIENCE_S = 120.0
_POLL_S = 0.1


class NotRunning(Exception):  # noqa: N818 - names the outcome
    """A gateway did not come to answer; says what it printed last."""


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that has answered. start_s: from its process's beginning until then."""

    name: str
    target: Target
    start_s: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fleet:
    """How the workers are. model: None is the simulated engine's own."""

    environment: dict[str, str]
    model: Path | None

    @property
    def model_path(self) -> Path:
        return self.model or SIM_MODEL

    @property
    def model_name(self) -> str:
        return "sim" if self.model is None else self.model.resolve().name

    @property
    def flags(self) -> list[str]:
        return [] if self.model is None else ["--model", str(self.model), "--served-model-name", self.model_name]


def demo_model() -> Path | None:
    """None: it belongs to vLLM's installation. The simulated engine has a tokenizer of its own, of bytes."""
    try:
        return ensure_demo_model()
    except DemoModelError:
        return None


@contextlib.asynccontextmanager
async def planes() -> AsyncIterator[tuple[str, str]]:
    """URLs of an etcd and a NATS."""
    with tempfile.TemporaryDirectory(prefix="headrace-planes-") as name:
        async with etcd_server(Path(name, "etcd")) as etcd, nats_server(Path(name, "nats")) as nats:
            yield etcd.url, nats.url


@contextlib.asynccontextmanager
async def plain_workers(fleet: Fleet, count: int) -> AsyncIterator[list[str]]:
    """URLs of simulated workers that speak plain HTTP."""
    async with contextlib.AsyncExitStack() as cleanup:
        urls = []
        for _ in range(count):
            port = free_port()
            argv = program("workers.sim.plain", "--port", str(port), *fleet.flags)
            log = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="headrace-plain-")), "log")
            process = await cleanup.enter_async_context(process_of(argv, ours_in(fleet.environment), log))
            await answering(port, fleet.model_name, process, log)
            urls.append(f"http://127.0.0.1:{port}")
        yield urls


@contextlib.asynccontextmanager
async def peer(gateway: Gateway, fleet: Fleet, workers: Sequence[str], etcd: str, nats: str) -> AsyncIterator[Running]:
    """One of the others.  Raises:  NotRunning."""
    async with contextlib.AsyncExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="headrace-peer-")))
        site = Site(free_port(), free_port(), workers, fleet.model_name, fleet.model_path.resolve(), folder, etcd, nats)
        ours = ("PYTHONPATH", "VIRTUAL_ENV")
        others = {name: value for name, value in os.environ.items() if name not in ours}
        environment = others | gateway.environment(site)
        if gateway.workers is not None:
            argv = _of_environment(gateway, gateway.workers(site))
            await cleanup.enter_async_context(process_of(argv, environment, folder / "workers.log"))
        log = folder / "log"
        argv = _of_environment(gateway, gateway.argv(site))
        process = await cleanup.enter_async_context(process_of(argv, environment, log))
        root = Process(process.pid, "gateway")
        await answering(site.port, site.model, process, log)
        start_s = root.age_s()
        processes = [root, *(Process(child.pid, "gateway") for child in descendants(process.pid))]
        yield Running(gateway.name, Target(site.port, site.model, processes), start_s, gateway.note)


@contextlib.asynccontextmanager
async def headrace(policy: str, fleet: Fleet, python: str = sys.executable) -> AsyncIterator[Running]:
    """Ours, of the installation that has this Python, before two simulated workers that do both."""
    async with planes() as (etcd, nats):
        shared = ["--etcd", etcd, "--nats", nats, "--namespace", "local", "--policy", policy]
        flags = ["--engine", "sim", "--prefill", "0", "--decode", "0", "--both", "2", *shared, *fleet.flags]
        async with stack(*flags, environment=fleet.environment, python=python) as running:
            gateway = next(process for process in running.processes() if process.name == "gateway")
            await answering(running.port, running.model, None, running.state / "gateway.log")
            another = [python, "-m", "app.cli", "gateway", *shared]
            start_s = await _start_of_another(another, fleet, running.state / "another.log")
            note = "tokenizes, exact index" if policy == "headrace" else "tokenizes"
            yield Running(headrace_name(policy), Target(running.port, running.model, [gateway]), start_s, note)


async def _start_of_another(argv: list[str], fleet: Fleet, log: Path) -> float:
    """Seconds that one more gateway takes to answer, before workers that are there: `headrace up` starts its own side
    by side with them.
    """
    port = free_port()
    async with process_of([*argv, "--port", str(port)], ours_in(fleet.environment), log) as process:
        await answering(port, fleet.model_name, process, log)
        return Process(process.pid, "gateway").age_s()


def _of_environment(gateway: Gateway, argv: Sequence[str]) -> list[str]:
    return [str(gateway.bin / argv[0]), *argv[1:]]


@contextlib.asynccontextmanager
async def process_of(
    argv: Sequence[str], environment: dict[str, str], log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """In a session of its own, so that what it starts ends with it."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def answering(
    port: int,
    model: str,
    process: asyncio.subprocess.Process | None,
    log: Path,
    *,
    patience_s: float = _PATIENCE_S,
) -> None:
    """Until a chat is answered.  Raises:  NotRunning."""
    until, said = time.monotonic() + patience_s, "nothing listens"
    while time.monotonic() < until:
        if process is not None and process.returncode is not None:
            raise NotRunning(f"it ended with status {process.returncode}: {_last_words(log)}")
        client = Client("127.0.0.1", port)
        try:
            async with asyncio.timeout(10):
                sample = await client.post(CHAT.path, CHAT.body(model, "hello", 2))
            if not sample.error and sample.first_token_at is not None:
                return
            said = sample.error or "an answer without text"
        except (OSError, ValueError, TimeoutError) as exc:
            said = repr(exc)
        finally:
            client.close()
        await asyncio.sleep(_POLL_S)
    raise NotRunning(f"no answer within {patience_s:g} s ({said[:200]}): {_last_words(log)}")


def ours_in(environment: dict[str, str]) -> dict[str, str]:
    """What a program of this installation is told."""
    return os.environ | environment


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["it printed nothing"])[-1][:300]
