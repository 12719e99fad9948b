"""Real engines for the end-to-end tests, one process each: a start takes half a minute of CPU, so they are shared."""

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
from xdist.scheduler import LoadScopeScheduling

from planes.wire.frames import Sampling, Ticket
from planes.wire.messages import HandoverEndpoint, HandoverMode
from tests.e2e.thinking_model import write_thinking_model
from workers.demo_model.convert import ensure_demo_model

DRIVER = Path(__file__).parent / "engine_driver.py"
ROOT = DRIVER.parents[2]
MODEL = "demo"
PATIENCE_S = 600.0
"""For machines with other things to do; nothing waits so long unless something is broken."""
PUSH_TIMEOUT_S = 40.0
"""One test waits for it."""

OF_THE_PAIR = ("test_one_engine.py", "test_vllm_engine.py")


class ByEngines(LoadScopeScheduling):
    """What `pytest -n 2` has one process run, in order: the tests of the same engines."""

    def _split_scope(self, nodeid):
        file, _, test = nodeid.partition("::")
        mode = next((mode for mode in HandoverMode if f"[{mode}" in test), "")
        return f"{'pair' if file.endswith(OF_THE_PAIR) else file} {mode}"


def pytest_xdist_make_scheduler(config, log):
    return ByEngines(config, log)


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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Where torch would put what it compiles."""
    return tmp_path_factory.mktemp("compiled")


@contextlib.asynccontextmanager
async def engines(model_path, compiled):
    """Starts engines of one model in float32, small and cheap, and stops them in the end."""
    started = []

    async def start(worker, **options):
        small = {
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "kv_cache_bytes": 96 << 20,
            "lease_s": 300,  # on a busy machine, too, longer than any test that measures what is given up before
        }
        place = {"model_path": str(model_path), "model": MODEL, "worker": worker}
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        engine = await EngineProcess.launch(environment=environment, **(place | small | options))
        started.append(engine)
        await engine.started()
        return engine

    try:
        yield start
    finally:
        await asyncio.gather(*(engine.stop() for engine in started))


@contextlib.asynccontextmanager
async def engine_pair(mode, model_path, compiled, **options):
    """A prefill and a decode engine that hand over in one mode, on a core each."""
    cores = sorted(os.sched_getaffinity(0))
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":  # prefill has more to do: not on the core of the other pair's
        cores.reverse()
    async with engines(model_path, compiled) as start:
        prefill, decode = await asyncio.gather(
            start(f"p-{mode}", role="prefill", handover=mode, cores=cores[:1], **options),
            start(f"d-{mode}", role="decode", handover=mode, cores=cores[-1:], **options),
        )
        yield mode, prefill, decode


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def start_engine(demo_model, compiled):
    async with engines(demo_model, compiled) as start:
        yield start


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=list(HandoverMode), ids=str)
async def pair(request, thinking_model, compiled):
    """Of a model with thoughts: engines with all that a request can ask for."""
    mode = request.param
    parser = {HandoverMode.PULL: "deepseek_r1", HandoverMode.PUSH: "hf"}[mode]
    options = {"reasoning_parser": parser, "push_timeout_s": PUSH_TIMEOUT_S}
    async with engine_pair(mode, thinking_model, compiled, **options) as both:
        yield both
