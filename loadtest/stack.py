"""A whole local Headrace for a benchmark: `headrace up` in a child process, on a free port, in a scratch folder."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.processes import Process, descendants, free_port

_SPEEDUP: Final = 1000
"""Of the engine's clock: prompts take as good as no time, and a step as long with 256 sequences as with one."""


def fast_engine(step_s: float) -> dict[str, str]:
    """Settings of simulated workers that are never what is waited for: a step takes `step_s` whatever is in it, one of
    prompts alone next to nothing.

    Answers are as long as their requests let them be. A KV cache of an 8B model's size would have workers write 6 ms of
    CPU for each new prompt of 8,000 characters.
    """
    return {
        "HEADRACE_SPEEDUP": str(_SPEEDUP),
        "HEADRACE_SIM_STEP_S": str(step_s * _SPEEDUP),  # told in the engine's own time
        "HEADRACE_SIM_ANSWER_TOKENS": "0",
        "HEADRACE_SIM_KV_BYTES_PER_TOKEN": "8",
        "HEADRACE_MAX_STEP_TOKENS": "100000",
    }


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack. `etcd` and `nats` are URLs."""

    port: int
    pid: int
    state: Path
    model: str

    def processes(self) -> list[Process]:
        return descendants(self.pid)


@contextlib.asynccontextmanager
async def stack(
    *flags: str, environment: dict[str, str] | None = None, timeout_s: float = 300, python: str = sys.executable
) -> AsyncIterator[Stack]:
    """`headrace up` with these flags, ready to serve.  Raises:  RuntimeError with what it printed instead.

    Args:  python: of the installation.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="headrace-stack-") as folder:
        process = await asyncio.create_subprocess_exec(
            *(python, "-m", "app.cli", "up", "--port", str(port), "--state-dir", folder, *flags),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | (environment or {}),
        )
        output, said = process.stdout, list[str]()
        if output is None:
            raise RuntimeError("headrace up was started without a pipe for what it prints")
        try:
            async with asyncio.timeout(timeout_s):
                while not any("Headrace listens" in line for line in said):
                    line = await output.readline()
                    if not line:
                        raise RuntimeError("headrace up ended:\n" + "".join(said))
                    said.append(line.decode())
            body = (await output.readuntil(b'"model": "') + await output.readuntil(b'"')).decode()
            yield Stack(port, process.pid, Path(folder), body.rpartition('"model": "')[2].rstrip('"'))
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.communicate()
