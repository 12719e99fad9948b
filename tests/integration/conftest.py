"""Real processes for black-box tests: workers with the simulated engine and gateways, in namespaces of their own.

A token of the simulated engine is one character of text and a function of everything before it: equal texts are equal
token sequences, and a lost or repeated token shows in every character after it.
"""

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import aetcd
import httpx
import pytest
import pytest_asyncio

from app.cli.servers import tied_to_parent
from planes.control import Etcd

ROOT = Path(__file__).parents[2]
PATIENCE_S = 180.0
"""A deadline for what should happen soon; only a failing test waits so long."""


async def poll_until(condition, what="", *, seconds=PATIENCE_S):
    """The first true value of `condition()`, awaited if need be; asked again until it comes or the time is over."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                value = condition()
                if inspect.isawaitable(value):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {what or inspect.getsource(condition).strip()}") from None


class ForgetfulEtcd(Etcd):
    """The answer to the first transaction is lost: it was done, and who asked does not know."""

    has_forgotten = False

    @asynccontextmanager
    async def session(self):
        async with super().session() as client:
            transaction = client.transaction

            async def forgotten(*args, **kwargs):
                done = await transaction(*args, **kwargs)
                if not self.has_forgotten:
                    self.has_forgotten = True
                    raise aetcd.ClientError("the answer was lost")
                return done

            client.transaction = forgotten
            yield client


class Process:
    """A child process; its output goes to a file."""

    def __init__(self, name: str, argv: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.name, self.log = name, log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                tied_to_parent(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
                env=env,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def said(self, words: str) -> str | None:
        """The first whole line with these words in it."""
        text = self.log.read_text(errors="replace")
        return next((line for line in text[: text.rfind("\n") + 1].splitlines() if words in line), None)

    async def says(self, words: str) -> str:
        def heard() -> str | None:
            was_running = self.is_running
            line = self.said(words)
            assert line is not None or was_running, f"{self.name} ended: {self.log.read_text(errors='replace')}"
            return line

        return await poll_until(heard, f"{self.name} says {words!r}")

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    async def ended(self) -> int:
        """Its exit status."""
        await poll_until(lambda: not self.is_running, f"{self.name} ends")
        return self.popen.returncode

    def kill(self) -> None:
        if self.is_running:
            self.popen.kill()
        self.popen.wait()


@dataclass
class Gateway:
    process: Process
    url: str = ""


@dataclass
class Site:
    """A namespace of one etcd and one NATS, and the processes that a test has started in it."""

    etcd: str
    nats: str
    logs: Path
    namespace: str = field(default_factory=lambda: f"site-{uuid.uuid4().hex[:12]}")
    processes: list[Process] = field(default_factory=list)

    @property
    def flags(self) -> list[str]:
        return ["--namespace", self.namespace]

    @property
    def environment(self) -> dict[str, str]:
        """Urls come this way: a secret in one must not be on a command line.

        Who is silent on a busy machine is not dead: where that is measured, a flag says so.
        """
        return {"HEADRACE_ETCD": self.etcd, "HEADRACE_NATS": self.nats, "HEADRACE_DEAD_AFTER_S": "60"}

    def start(self, name: str, argv: list[str], env: dict[str, str] | None = None) -> Process:
        env = (dict(os.environ) if env is None else env) | self.environment
        log = self.logs / f"{len(self.processes)}-{name}.log"
        process = Process(name, [sys.executable, "-m", *argv], log, env)
        self.processes.append(process)
        return process

    def start_worker(self, name: str, *flags: str, speedup: float = 10) -> Process:
        """`name` begins with its role. Not yet ready."""
        own = ["--role", name.partition("-")[0], "--worker-id", name, "--engine", "sim", "--speedup", str(speedup)]
        return self.start(name, ["workers", *own, *self.flags, *flags])

    def start_gateway(self, *flags: str) -> Gateway:
        """Not yet listening."""
        cache = ["--cache-dir", str(self.logs / "assets")]
        return Gateway(self.start("gateway", ["app.cli", "gateway", "--port", "0", *cache, *self.flags, *flags]))

    async def worker(self, name: str, *flags: str, speedup: float = 10) -> Process:
        process = self.start_worker(name, *flags, speedup=speedup)
        await process.says("event=worker.ready")
        return process

    async def gateway(self, *flags: str, num_workers: int = 0) -> Gateway:
        """One that is connected to so many workers."""
        gateway = self.start_gateway(*flags)
        await self.ready(gateway, num_workers)
        return gateway

    async def ready(self, gateway: Gateway, num_workers: int) -> None:
        line = await gateway.process.says("event=gateway.listening")
        gateway.url = "http://127.0.0.1:" + next(w for w in line.split() if w.startswith("port=")).removeprefix("port=")
        async with Api(gateway.url) as api:

            async def is_connected() -> bool:
                return (await api.get("/health")).json()["workers"] == num_workers

            await poll_until(is_connected, f"{num_workers} workers are connected: {self.namespace}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()


class Stream:
    """A streamed answer, as far as it has been read."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.headers = response.headers
        self.events: list[dict] = []
        self.text = ""
        self.finish: str | None = None
        self.error: dict | None = None
        self.is_done = False
        self._lines = response.aiter_lines()

    async def read(self, num_tokens: int | None = None) -> str:
        """Read on until there is so much text, or to the end."""
        while num_tokens is None or len(self.text) < num_tokens:
            line = await anext(self._lines, None)
            if line is None:
                break
            if line == "data: [DONE]":
                self.is_done = True
            elif line:
                self._take(json.loads(line.removeprefix("data: ")))
        return self.text

    def _take(self, event: dict) -> None:
        self.events.append(event)
        self.error = event.get("error", self.error)
        for choice in event.get("choices", []):
            self.text += choice["delta"].get("content") or ""
            self.finish = choice["finish_reason"] or self.finish


class Api:
    """A plain HTTP client of one gateway."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S)
        self.get = self._http.get
        self.post = self._http.post

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def body(self, prompt: str, *, max_tokens: int = 16, **fields: object) -> dict:
        messages = [{"role": "user", "content": prompt}]
        return {"model": "sim", "messages": messages, "max_tokens": max_tokens, "ignore_eos": True, **fields}

    async def chat(self, prompt: str, *, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        return await self.post("/v1/chat/completions", json=self.body(prompt, **fields), headers=headers)

    async def text(self, prompt: str, **fields: object) -> str:
        """The answer's text; it must be there."""
        response = await self.chat(prompt, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    @asynccontextmanager
    async def stream(self, prompt: str, **fields: object) -> AsyncIterator[Stream]:
        body = self.body(prompt, stream=True, **fields)
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
            assert response.status_code == 200, response.text
            yield Stream(response)

    async def fleet(self) -> dict[str, dict]:
        return {worker["worker"]: worker for worker in (await self.get("/v1/fleet")).json()["workers"]}

    async def metric(self, name: str, *, headers: dict[str, str] | None = None, **labels: str) -> float:
        """The sum over all series with these labels."""
        text = (await self.get("/metrics", headers=headers)).text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))

    async def cached_tokens(self, prompt: str, **fields: object) -> dict[str, int]:
        """For each decode worker: how much of the prompt the gateway thinks it holds."""
        preview = (await self.post("/v1/routes", json=self.body(prompt, **fields))).json()
        return {option["decode"]: option["decode_cached_tokens"] for option in preview["candidates"]}

    async def is_idle(self) -> bool:
        """Whether no worker has anything to do, as it says itself and as this gateway counts."""
        return all(
            worker["load"]
            and (worker["num_streams"], worker["load"]["num_running"], worker["load"]["num_waiting"]) == (0, 0, 0)
            for worker in (await self.fleet()).values()
        )


async def refuses(url: str) -> bool:
    """Whether nothing listens there any more."""
    try:
        async with Api(url) as late:
            await late.get("/live")
    except httpx.TransportError:
        return True
    return False


@dataclass
class Stack:
    """The fleet that all tests share which change nothing in it."""

    site: Site
    gateway: Gateway
    """With the default policy."""
    pairing: Gateway
    """Always prefills and decodes on different workers."""
    alone: Gateway
    """In front of a single worker of its own: what it answers is right."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stack(etcd_url: str, nats_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    site = Site(etcd_url, nats_url, tmp_path_factory.mktemp("stack"))
    other = Site(etcd_url, nats_url, tmp_path_factory.mktemp("alone"))
    try:
        for name in ("prefill-1", "decode-1", "decode-2"):
            site.start_worker(name)
        other.start_worker("both-1", speedup=100)
        pairing = site.start_gateway("--policy", "round_robin")
        shared = Stack(site, site.start_gateway(), pairing, other.start_gateway())
        await site.ready(shared.gateway, 3)
        await site.ready(shared.pairing, 3)
        await other.ready(shared.alone, 1)
        yield shared
    finally:
        site.close()
        other.close()


@pytest.fixture
def site(etcd_url: str, nats_url: str, tmp_path: Path) -> Iterator[Site]:
    """An empty namespace."""
    own = Site(etcd_url, nats_url, tmp_path)
    yield own
    own.close()


@pytest.fixture
async def api(stack: Stack) -> AsyncIterator[Api]:
    """The shared fleet behind the default policy."""
    async with Api(stack.gateway.url) as client:
        yield client


@pytest.fixture
async def pairing(stack: Stack) -> AsyncIterator[Api]:
    """The shared fleet behind a policy that always hands over."""
    async with Api(stack.pairing.url) as client:
        yield client


@pytest.fixture
async def alone(stack: Stack) -> AsyncIterator[Api]:
    """One worker that nothing happens to: what it answers is right."""
    async with Api(stack.alone.url) as client:
        yield client


@pytest.fixture
def reach() -> Callable[[Gateway], Api]:
    """A client of some other gateway; `async with` closes it."""
    return lambda gateway: Api(gateway.url)


@pytest.fixture
def until():
    return poll_until


@pytest.fixture
def unique() -> str:
    """A text that no other prompt begins with, longer than a block."""
    return f"{uuid.uuid4().hex}: tell me something about mills and rivers."
