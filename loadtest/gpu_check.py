"""Ten minutes on a machine with a GPU: does Headrace with vLLM work there, and how fast?

    python -m loadtest.gpu_check                  # the demo model, CUDA
    python -m loadtest.gpu_check --model FOLDER   # another one
    python -m loadtest.gpu_check --device cpu     # the same without a GPU, to see that the check itself works

Six steps, each of which says what it found; the first that cannot be done ends the check.

| step        | passes if                                                                                       |
|-------------|-------------------------------------------------------------------------------------------------|
| environment | torch sees what vLLM was built for, and NIXL for its CUDA is there                                |
| start       | etcd, NATS, a gateway, a prefill and a decode worker come up; each worker has a GPU if there are two |
| handover    | a prompt computed by one worker is answered by the other, and its KV cache was moved             |
| equality    | answers that were handed over are those of one engine alone: all in float32, half else           |
| bandwidth   | KV caches of several sizes arrive; their bytes a second are told                                  |
| mix         | chats among long prompts are all answered; times to first token and between tokens are told      |

Half is enough in bfloat16 because a near tie may fall either way there; with a wrong KV cache next to none are equal.
"""

import asyncio
import importlib.metadata
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import uvloop
from cyclopts import App, Parameter

from app.cli.servers import etcd_server, free_port, nats_server
from loadtest.client import Client, Sample
from loadtest.live import ask, mixed_arrivals, replay
from loadtest.stack import Stack
from loadtest.written import check_file
from workers.engine.base import EngineStartError
from workers.vllm.requirements import check_accelerator, check_nixl

app = App(help=__doc__, version_flags=[])

_CONTEXT_TOKENS = 4096
_KV_CACHE_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
_START_S, _STOP_S = 600.0, 60.0


class CheckError(Exception):
    """A step found something wrong; the message says what and, if it is known, what to do."""


@dataclass(slots=True)
class Check:
    """What was found so far."""

    device: Literal["cuda", "cpu"]
    model: Path | None
    seconds: float
    num_gpus: int = 0
    dtype: str = "auto"
    found: list[str] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.started_at:5.0f} s] {line}", flush=True)

    def passed(self, step: str, what: str) -> None:
        self.found.append(f"ok      {step:12} {what}")
        self.say(f"{step}: ok. {what}")


# --- 1: environment --------------------------------------------------------------------------------------------------


def environment(check: Check) -> None:
    try:
        import torch  # noqa: PLC0415 - seconds, and not everywhere
        import vllm  # noqa: PLC0415
        from vllm.platforms import current_platform  # noqa: PLC0415
    except ImportError as exc:
        raise CheckError(f"{exc.name} is not installed: make install EXTRA={check.device}") from exc
    if current_platform.is_cpu() and check.device == "cuda":
        raise CheckError(
            f"no GPU can be used: vLLM {vllm.__version__} is here in its build for CPU. make install EXTRA=cuda on a "
            "machine with a GPU, or --device cpu"
        )
    if check.device == "cpu" and not current_platform.is_cpu():
        raise CheckError("vLLM is here in its build for GPUs: make install EXTRA=cpu, or leave --device cpu out")
    try:
        check_accelerator(current_platform, num_gpus=1)
        check_nixl(torch.version.cuda)
    except EngineStartError as exc:
        raise CheckError(str(exc)) from exc
    names = []
    if check.device == "cuda":
        check.num_gpus = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(number) for number in range(check.num_gpus)]
    wheels = [f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name.startswith("nixl")]
    check.passed("environment", f"vLLM {vllm.__version__}, torch {torch.__version__}, {wheels}, {names or 'CPU'}")


# --- 2: start --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def started(check: Check, folder: Path) -> AsyncIterator[Stack]:
    """A whole fleet, each part with a log in `folder`.  Raises:  CheckError with a part's last lines."""
    async with AsyncExitStack() as parts:
        etcd = await parts.enter_async_context(etcd_server(folder / "etcd"))
        nats = await parts.enter_async_context(nats_server(folder / "nats"))
        planes = ("--etcd", etcd.url, "--nats", nats.url)
        port = free_port("gateway", 0)
        processes = {"gateway": await _begin(folder, "gateway", "app.cli", "gateway", "--port", str(port), *planes)}
        parts.push_async_callback(_end, processes)
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        for number, role in enumerate(("prefill", "decode")):
            flags = ["--role", role, "--worker-id", role, "--context-length", str(_context_tokens(check)), *planes]
            flags += ["--kv-cache-bytes", str(_KV_CACHE_BYTES[check.device])]
            flags += ["--model", str(check.model)] if check.model else []
            flags += ["--dtype", check.dtype] if check.dtype != "auto" else []
            if check.device == "cpu":
                mine = cores[:half] if number == 0 else cores[-half:]
                flags += ["--cores", ",".join(map(str, mine))]
            gpu = {"CUDA_VISIBLE_DEVICES": str(number)} if check.num_gpus > 1 else {}
            processes[role] = await _begin(folder, role, "workers", *flags, environment=gpu)
        stack = Stack(port, processes["gateway"].pid, folder, "")
        await _until_ready(check, stack, processes)
        models = ask(stack, "/v1/models")["data"]
        yield Stack(port, processes["gateway"].pid, folder, models[0]["id"])


def _context_tokens(check: Check) -> int:
    return _CONTEXT_TOKENS if check.device == "cuda" else 2048


async def _begin(
    folder: Path, name: str, module: str, *flags: str, environment: dict[str, str] | None = None
) -> asyncio.subprocess.Process:
    with (folder / f"{name}.log").open("wb") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", module, *flags),
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | (environment or {}),
        )


async def _until_ready(check: Check, stack: Stack, processes: dict[str, asyncio.subprocess.Process]) -> None:
    deadline, told = time.monotonic() + _START_S, 0.0
    while True:
        for name, process in processes.items():
            if process.returncode is not None:
                raise CheckError(f"{name} ended with status {process.returncode}:\n{_last_lines(stack.state, name)}")
        try:
            if len(ask(stack, "/v1/fleet")["workers"]) == 2 and ask(stack, "/health")["workers"] == 2:
                return
        except (OSError, urllib.error.URLError):
            pass
        if time.monotonic() > deadline:
            raise CheckError(f"not ready after {_START_S:g} s:\n{_last_lines(stack.state, 'decode')}")
        if time.monotonic() - told > 10:
            told = time.monotonic()
            check.say("… " + "; ".join(f"{name}: {_last_lines(stack.state, name, 1)[:90]}" for name in processes))
        await asyncio.sleep(0.5)


def _last_lines(folder: Path, name: str, count: int = 12) -> str:
    lines = (folder / f"{name}.log").read_text(errors="replace").splitlines()
    return "\n".join(lines[-count:])


async def _end(processes: dict[str, asyncio.subprocess.Process]) -> None:
    for process in reversed(processes.values()):
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
    for process in processes.values():
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()


# --- 3 to 6 ----------------------------------------------------------------------------------------------------------


async def complete(stack: Stack, prompt: list[int], *, handover: str, salt: str, max_tokens: int) -> Sample:
    """A greedy completion.  Raises:  CheckError."""
    body = {
        "model": stack.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": salt,
    }
    client = Client("127.0.0.1", stack.port, keeps_text=True)
    try:
        sample = await client.post("/v1/completions", body, {"x-headrace-handover": handover})
    finally:
        client.close()
    if sample.error or sample.status != 200:
        raise CheckError(f"a prompt of {len(prompt)} tokens, handover {handover}: {sample.status} {sample.error}")
    return sample


def tokens(seed: int, count: int) -> list[int]:
    """Common tokens of any vocabulary, by chance."""
    rng = random.Random(seed)
    return [rng.randrange(1000, 20_000) for _ in range(count)]


async def handover(check: Check, stack: Stack) -> None:
    sample = await complete(stack, tokens(0, 300), handover="always", salt="handover", max_tokens=8)
    prefill, decode = sample.headers.get("x-headrace-prefill"), sample.headers.get("x-headrace-decode")
    moved = _observed(stack, sample)
    if (prefill, decode) != ("prefill", "decode") or not moved[0]:
        fallback = sample.headers.get("x-headrace-fallback")
        raise CheckError(f"computed by {prefill}, answered by {decode}, {moved[0]} bytes moved, fallback {fallback}")
    check.passed("handover", f"computed by {prefill}, answered by {decode}, {moved[0]} bytes moved")


def _observed(stack: Stack, sample: Sample) -> tuple[int, float]:
    """(bytes, seconds) of the request's handover."""
    observed = ask(stack, f"/v1/routes/{sample.headers['x-request-id']}")["observed"]
    return observed.get("handover_bytes") or 0, observed.get("handover_s") or 0.0


async def equality(check: Check, stack: Stack) -> None:
    lengths = (33, 64, 150, 256, 333, 512, 641, 900)
    num_equal = 0
    for number, length in enumerate(lengths):
        prompt = tokens(100 + number, length)
        both = [
            await complete(stack, prompt, handover=how, salt=f"{how}-{number}", max_tokens=24)
            for how in ("never", "always")
        ]
        is_equal = both[0].text == both[1].text
        num_equal += is_equal
        check.say(f"… {length} tokens: {'equal' if is_equal else 'different'}")
    needed = len(lengths) if check.dtype == "float32" else len(lengths) // 2
    what = f"{num_equal} of {len(lengths)} handed-over answers are those of one engine alone ({check.dtype})"
    if num_equal < needed:
        raise CheckError(f"{what}; {needed} are needed")
    check.passed("equality", what)


async def bandwidth(check: Check, stack: Stack) -> None:
    lines = []
    for length in (256, 512, 1024, _context_tokens(check) - 64):
        moved = []
        for number in range(5):
            prompt = tokens(1000 * length + number, length)
            sample = await complete(stack, prompt, handover="always", salt="bandwidth", max_tokens=2)
            moved.append(_observed(stack, sample))
        num_bytes = moved[0][0]
        if not num_bytes:
            raise CheckError(f"the KV cache of {length} tokens did not move")
        seconds = statistics.median(taken for _, taken in moved[1:])
        rate = f"{num_bytes / seconds / 1e9:.2f} GB/s" if seconds else "unmeasured"
        lines.append(f"{length} tokens: {num_bytes / 1e6:.1f} MB in {seconds * 1e3:.1f} ms, {rate}")
        check.say(f"… {lines[-1]}")
    check.passed("bandwidth", "; ".join(lines))


async def mix(check: Check, stack: Stack) -> None:
    scale = 4.0 if check.device == "cuda" else 0.3
    arrivals = mixed_arrivals(stack.model, check.seconds, 1, scale, "check")
    if not arrivals:
        raise CheckError(f"no request arrives within {check.seconds} s: take more --seconds")
    check.say(f"… {len(arrivals)} requests in {check.seconds:g} s")
    samples = await replay(stack, arrivals)
    errors = [sample.error for sample in samples if sample.error]
    if errors:
        raise CheckError(f"{len(errors)} of {len(samples)} requests failed; the first with {errors[0]}")
    ttfts = sorted(sample.ttft_s * 1e3 for sample in samples)
    gaps = sorted(gap * 1e3 for sample in samples for gap in sample.gaps_s) or [0.0]
    num_tokens = sum(sample.completion_tokens for sample in samples)
    check.passed(
        "mix",
        f"{len(samples)} requests, {num_tokens} tokens; TTFT p50 {statistics.median(ttfts):.0f} ms, longest "
        f"{ttfts[-1]:.0f}; between tokens p50 {statistics.median(gaps):.1f} ms, p99 {gaps[int(len(gaps) * 0.99)]:.1f}",
    )


_STEPS: tuple[Callable[[Check, Stack], Awaitable[None]], ...] = (handover, equality, bandwidth, mix)


async def run(check: Check) -> None:
    with tempfile.TemporaryDirectory(prefix="headrace-check-") as folder:
        check.say("start: workers load vLLM and the model, which takes a minute or more …")
        begun = time.monotonic()
        async with started(check, Path(folder)) as stack:
            where = f"{check.num_gpus} GPUs" if check.num_gpus > 1 else "one GPU" if check.num_gpus else "CPU"
            check.passed("start", f"{stack.model}: two workers on {where} in {time.monotonic() - begun:.0f} s")
            for step in _STEPS:
                check.say(f"{step.__name__} …")
                try:
                    await step(check, stack)
                except CheckError as exc:
                    logs = "\n".join(f"--- {name}\n{_last_lines(stack.state, name)}" for name in ("prefill", "decode"))
                    raise CheckError(f"{step.__name__}: {exc}\n{logs}") from exc


@app.default
def main(
    *,
    device: Literal["cuda", "cpu"] = "cuda",
    model: Path | None = None,
    dtype: str = "auto",
    seconds: float = 30.0,
    out: Annotated[Path | None, Parameter(name="--json", help="Write what was found there too.")] = None,
) -> int:
    """Check a machine, step by step. The exit status is 0 if everything passed.

    Args:
        device: what vLLM runs on
        model: directory of a model; default: the demo model
        dtype: number format of the weights; equality is strict in float32
        seconds: of arrivals in the mix
    """
    check_file("json", out)
    check = Check(device, model, seconds, dtype=dtype if device == "cuda" or dtype != "auto" else "float32")
    status = 0
    try:
        environment(check)
        uvloop.run(run(check))
    except CheckError as exc:
        check.found.append(f"FAILED  {exc}")
        status = 1
    print("\nFound:", *check.found, sep="\n  ")
    print("Everything passed." if not status else "Something failed: see above.")
    if out is not None:
        result: dict[str, Any] = {"passed": not status, "found": check.found}
        out.write_bytes(msgspec.json.encode(result))
    return status


if __name__ == "__main__":
    sys.exit(app())
