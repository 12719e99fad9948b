"""Real engines for the end-to-end tests, one process each, shared by a module: a start takes half a minute of CPU."""

import asyncio
import base64
import contextlib
import itertools
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from planes.wire.frames import Sampling, Ticket
from planes.wire.messages import HandoverEndpoint
from tests.e2e.thinking_model import write_thinking_model
from workers.demo_model.convert import ensure_demo_model

DRIVER = Path(__file__).parent / "engine_driver.py"
ROOT = DRIVER.parents[2]
MODEL = "demo"
PATIENCE_S = 600.0
"""For machines with other things to do; nothing waits so long unless something is broken."""


@pytest.fixture(scope="session")
def demo_model():
    return ensure_demo_model()


@pytest.fixture(scope="session")
def thinking_model(demo_model, tmp_path_factory):
    return write_thinking_model(demo_model, tmp_path_factory.mktemp("models") / "thinker")


@dataclass
class Answer:
    """Everything the engine said about one request. invalid: its refusal instead."""

    tokens: list[int] = field(default_factory=list)
    by_choice: dict[int, list[int]] = field(default_factory=dict)
    last: dict = field(default_factory=dict)
    outputs: list[dict] = field(default_factory=list)
    invalid: dict | None = None

    @property
    def ticket(self):
        packed = self.last["ticket"]
        return packed and msgspec.msgpack.decode(base64.b64decode(packed), type=Ticket)


class EngineProcess:
    """Talks to `engine_driver.py`."""

    def __init__(self, process):
        self.process = process
        self.said = []
        self.held = set()
        self.heard = asyncio.Condition()
        self.answers = {}
        self.ready = None
        self.reading = None
        self._ids = itertools.count()

    @classmethod
    async def launch(cls, *, environment, **options):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(DRIVER),
            msgspec.json.encode(options).decode(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            limit=1 << 22,
        )
        engine = cls(process)
        engine.reading = asyncio.create_task(engine._read())
        return engine

    async def started(self):
        await self.until(lambda: self.kinds() & {"ready", "refused", "gone"})
        self.ready = next((news for news in self.said if news["kind"] == "ready"), None)

    def kinds(self):
        return {news["kind"] for news in self.said}

    @property
    def endpoint(self):
        return msgspec.convert(self.ready["endpoint"], HandoverEndpoint)

    async def _read(self):
        async for line in self.process.stdout:
            news = msgspec.json.decode(line)
            match news["kind"]:
                case "held":
                    self.held = set(map(int, news["names"]))
                case "output":
                    self._output(self.answers[news["id"]], news)
                case "invalid":
                    self.answers[news["id"]].invalid = news
                case _:
                    self.said.append(news)
            async with self.heard:
                self.heard.notify_all()
        self.said.append({"kind": "gone"})
        async with self.heard:
            self.heard.notify_all()

    @staticmethod
    def _output(answer, news):
        answer.outputs.append(news)
        answer.by_choice.setdefault(news["index"], []).extend(news["tokens"])
        if news["index"] == 0:
            answer.tokens += news["tokens"]
            if news["finish"]:
                answer.last = news

    async def until(self, happened):
        async with asyncio.timeout(PATIENCE_S), self.heard:
            await self.heard.wait_for(happened)

    def send(self, kind, **fields):
        self.process.stdin.write(msgspec.json.encode({"type": kind} | fields) + b"\n")

    def begin(
        self, prompt, sampling=None, leg=None, *, resume=(), salt="", name=None, parsing=None, is_embedding=False
    ):
        """Start a request; greedy unless `sampling` says otherwise."""
        name = name or f"r{next(self._ids)}"
        answer = self.answers[name] = Answer()
        sampling = Sampling(**({"max_tokens": 8, "temperature": 0.0} | (sampling or {})))
        leg = {"type": "local"} if leg is None else leg
        fields = {"prompt": prompt, "sampling": sampling, "leg": leg, "resume": list(resume), "salt": salt}
        self.send("run", id=name, parsing=parsing, is_embedding=is_embedding, **fields)
        return name, answer

    async def run(self, *args, **kwargs):
        """The whole answer to a request."""
        _, answer = self.begin(*args, **kwargs)
        num_choices = ((args[1:] and args[1]) or {}).get("n", 1)
        await self.until(
            lambda: answer.invalid or sum(bool(output["finish"]) for output in answer.outputs) == num_choices
        )
        return answer

    async def stop(self):
        if self.process.returncode is None:
            with contextlib.suppress(ConnectionError):
                self.send("stop")
        async with asyncio.timeout(PATIENCE_S):
            await self.process.wait()
            await self.reading


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where torch would put what it compiles."""
    return tmp_path_factory.mktemp("compiled")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_engine(demo_model, compiled):
    """Starts engines of the demo model in float32, small and cheap, and stops them after the module's last test."""
    engines = []

    async def start(worker, **options):
        small = {
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "kv_cache_bytes": 96 << 20,
            "lease_s": 60,  # on a busy machine, too, longer than any test that measures what is given up before
        }
        place = {"model_path": str(demo_model), "model": MODEL, "worker": worker}
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        engine = await EngineProcess.launch(environment=environment, **(place | small | options))
        engines.append(engine)
        await engine.started()
        return engine

    yield start
    await asyncio.gather(*(engine.stop() for engine in engines))
