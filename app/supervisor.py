"""Children of `headrace up`: started side by side, shown while they start, started again when they die, ended in order.

| state    | what happens                      | next                                                              |
|----------|-----------------------------------|-------------------------------------------------------------------|
| starting | says that it is ready             | ready                                                             |
| starting | ends, or takes too long           | ChildFailed with its last words; the supervisor's caller ends all |
| ready    | ends                              | starting, after a pause that grows with every quick death         |
| any      | the user wants to stop            | SIGTERM, and SIGKILL after a grace period                         |
"""

import asyncio
import re
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.servers import tied_to_parent
from planes.errors import HeadraceError

_RESTART_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S = 60.0
"""A child that lived this long starts over with the shortest pause."""
_POLL_S = 0.1


class ChildFailed(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """A child process could not start."""

    code = "child_failed"


@dataclass(slots=True)
class Child:
    """One supervised process of ours."""

    name: str
    argv: list[str]
    log: Path
    probe: Callable[[], Awaitable[bool]] | None = None
    """Asked whether the child is ready; None: it logs `worker.ready`."""
    process: Process | None = None
    step: str = ""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=5))


class Supervisor:
    """Starts children, waits until they are ready, starts them again when they die, and ends them."""

    def __init__(self, ready_timeout_s: float, stop: asyncio.Event) -> None:
        self._ready_timeout_s = ready_timeout_s
        self._stop = stop
        self._children: list[Child] = []
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def start(self, children: list[Child]) -> None:
        """Start all of them side by side; return when all are ready, or when the user wants to stop.

        Raises:  ChildFailed if one ends or takes longer than `ready_timeout_s`.
        """
        for child in children:
            self._children.append(child)
            await self._spawn(child)
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._stop.is_set():
            for child in children:
                await self._check(child)
            slow = [f"{child.name} ({child.step or 'starting'})" for child in children if not child.ready.is_set()]
            if not slow:
                return
            if time.monotonic() > deadline:
                limit = f"{self._ready_timeout_s:g} s"
                raise ChildFailed(f"not ready after {limit}: {', '.join(slow)}; --ready-timeout-s gives more")
            await asyncio.sleep(_POLL_S)

    async def _check(self, child: Child) -> None:
        if child.process is not None and child.process.returncode is not None:
            await self._readers[child.name]
            raise ChildFailed(f"{child.name} ended with status {child.process.returncode}: {_why(child)} ({child.log})")
        if child.probe is not None and not child.ready.is_set() and await child.probe():
            child.ready.set()

    async def watch(self) -> None:
        """Return when the user wants to stop; until then start again whatever dies."""
        async with asyncio.TaskGroup() as group:
            keepers = [group.create_task(self._keep_alive(child)) for child in self._children]
            await self._stop.wait()
            for keeper in keepers:
                keeper.cancel()

    async def _keep_alive(self, child: Child) -> None:
        failures = 0
        while child.process is not None:
            started_at = time.monotonic()
            status = await child.process.wait()
            await self._readers[child.name]
            failures = 0 if time.monotonic() - started_at > _STEADY_S else failures
            pause = _RESTART_PAUSES_S[min(failures, len(_RESTART_PAUSES_S) - 1)]
            failures += 1
            say(f"{child.name} ended with status {status}: {_why(child)}; starting it again in {pause:g} s")
            await asyncio.sleep(pause)
            await self._spawn(child)

    async def _spawn(self, child: Child) -> None:
        child.ready.clear()
        child.process = await asyncio.create_subprocess_exec(
            *tied_to_parent(child.argv),
            stdout=PIPE,
            stderr=STDOUT,
            start_new_session=True,  # Ctrl-C is for the supervisor; it ends the children in order
            limit=1 << 20,
        )
        self._readers[child.name] = asyncio.create_task(self._read(child, child.process))

    async def _read(self, child: Child, process: Process) -> None:
        """Keep the child's output in its log file; show its progress."""
        if process.stdout is None:
            return
        with child.log.open("ab") as log:
            while line := await read_line(process.stdout):
                log.write(line)
                log.flush()
                text = line.decode(errors="replace").rstrip()
                if " event=worker.ready" in text:
                    child.ready.set()
                    say(f"{child.name} is ready")
                elif " event=worker.progress" in text:
                    child.step = _field(text, "step")
                    say(f"{child.name}: {child.step}")
                if text:
                    child.last_words.append(text)

    async def stop_all(self) -> None:
        """SIGTERM to the gateway first, then to the workers; SIGKILL to whoever does not end in time."""
        for children in (
            [c for c in self._children if c.name == "gateway"],
            [c for c in self._children if c.name != "gateway"],
        ):
            await asyncio.gather(*(_end(child) for child in children))
        await asyncio.gather(*self._readers.values())


async def _end(child: Child, grace_s: float = 60.0) -> None:
    process = child.process
    if process is None or process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        say(f"{child.name} did not stop within {grace_s:g} s and is killed")
        process.kill()
        await process.wait()


async def read_line(stream: asyncio.StreamReader) -> bytes:
    """One line, or the first MiB of a longer one."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as exc:
        return exc.partial
    except asyncio.LimitOverrunError as exc:
        return await stream.readexactly(exc.consumed)


def _field(line: str, name: str) -> str:
    match = re.search(rf' {name}=("(?:[^"\\]|\\.)*"|\S+)', line)
    return match.group(1).strip('"') if match else ""


def _why(child: Child) -> str:
    """The child's own reason: its last line, without the log's decoration."""
    if not child.last_words:
        return "it said nothing"
    last = child.last_words[-1]
    return _field(last, "reason") or _field(last, "error") or last.removeprefix("headrace: ")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
