"""Children of `headrace up`: started side by side, shown while they start, started again when they die, ended in order.

| state    | what happens                      | next                                                              |
|----------|-----------------------------------|-------------------------------------------------------------------|
| starting | says that it is ready             | ready                                                             |
| starting | ends, or takes too long           | ChildFailed with its last words; the supervisor's caller ends all |
| ready    | ends                              | starting, after a pause that grows with every quick death         |
| any      | the user wants to stop            | SIGTERM, and SIGKILL after a grace period or when asked again     |

etcd and NATS are kept running by the same loop (`keep_running`). Only a child with a probe is waited for: the gateway
tells how many workers it has connected to, which is what ready means. The workers' logs are read for what the user may
want to see of them, no more: an operator may turn them down, or into JSON.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from asyncio.subprocess import STDOUT, Process
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path

from app.cli.servers import tied_to_parent
from planes.wire.errors import HeadraceError

_RESTART_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S = 60.0
"""A child that lived this long starts over with the shortest pause."""
_POLL_S = 0.1
_GRACE_S = 60.0
"""Longest end of one child; the processes' own limits for draining are shorter."""
_LAST_WORDS_S = 2.0


class ChildFailed(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """A child process could not start."""

    code = "child_failed"


@dataclass(slots=True)
class Child:
    """One supervised process of ours."""

    name: str
    argv: list[str]
    log: Path
    environment: dict[str, str]
    probe: Callable[[], Awaitable[bool]] | None = None
    """Asked whether the child is ready; None: nobody waits for it."""
    process: Process | None = None
    step: str = "starting"
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=5))


class Supervisor:
    """Starts children, waits until they are ready, starts them again when they die, and ends them."""

    def __init__(self, ready_timeout_s: float, stop: asyncio.Event, hurry: asyncio.Event) -> None:
        """stop: the user wants to end.  hurry: and does not want to wait for running streams."""
        self._ready_timeout_s = ready_timeout_s
        self._stop = stop
        self._hurry = hurry
        self._children: list[Child] = []
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def start(self, children: list[Child]) -> None:
        """Start all of them side by side; return when all are ready, or when the user wants to stop.

        Raises:  ChildFailed if one ends or takes longer than `ready_timeout_s`.
        """
        for child in children:
            self._children.append(child)
            child.log.unlink(missing_ok=True)
            await self._spawn(child)
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._stop.is_set():
            for child in children:
                await self._check(child)
            if all([child.probe is None or await child.probe() for child in children]):
                return
            if time.monotonic() > deadline:
                limit = f"{self._ready_timeout_s:g} s"
                steps = ", ".join(f"{child.name} ({child.step})" for child in children)
                raise ChildFailed(f"not ready after {limit}: {steps}; --ready-timeout-s gives more")
            await asyncio.sleep(_POLL_S)

    async def _check(self, child: Child) -> None:
        if child.process is not None and child.process.returncode is not None:
            await self._clear(child, child.process)
            raise ChildFailed(f"{ending(child.name, child.process.returncode, _why(child))} ({child.log})")

    async def watch(self) -> None:
        """Return when the user wants to stop; until then start again whatever dies."""
        async with asyncio.TaskGroup() as group:
            keepers = [group.create_task(keep_running(partial(self._ended, child))) for child in self._children]
            await self._stop.wait()
            for keeper in keepers:
                keeper.cancel()

    async def _ended(self, child: Child) -> str:
        """Wait until the child, started if it is not there, has ended; tell how."""
        process = child.process or await self._spawn(child)
        status = await process.wait()
        await self._clear(child, process)
        child.process = None
        return ending(child.name, status, _why(child))

    async def _clear(self, child: Child, process: Process) -> None:
        """Once it has ended: end what is left of its group, and hear its last words. Whatever has left the group may
        write on, and nobody listens.
        """
        _kill_group(process)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._readers[child.name]

    async def _spawn(self, child: Child) -> Process:
        """With a pipe of our own: asyncio's `wait` would wait for whoever can still write into its one, a child's
        own children included.
        """
        ours, theirs = os.pipe()
        output = os.fdopen(ours, "rb", buffering=0)
        try:
            process = child.process = await asyncio.create_subprocess_exec(
                *tied_to_parent(child.argv),
                stdout=theirs,
                stderr=STDOUT,
                env=child.environment,
                start_new_session=True,  # Ctrl-C is for the supervisor; it ends the children in order
            )
        except BaseException:
            output.close()
            raise
        finally:
            os.close(theirs)
        self._readers[child.name] = asyncio.create_task(self._read(child, output))
        return process

    async def _read(self, child: Child, output: FileIO) -> None:
        """Keep the child's output in its log file, until nobody is left who could write it; show its progress."""
        stream = asyncio.StreamReader(limit=1 << 20)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), output
        )
        with contextlib.closing(transport), child.log.open("ab") as log:
            while line := await read_line(stream):
                with contextlib.suppress(OSError):  # a disk that is full costs lines
                    log.write(line)
                    log.flush()
                text = line.decode(errors="replace").rstrip()
                if "worker.ready" in text or "worker.progress" in text:
                    self._progressed(child, text)
                if text:
                    child.last_words.append(text)

    def _progressed(self, child: Child, line: str) -> None:
        fields = _fields(line)
        match fields.get("event"):
            case "worker.ready":
                child.step = "ready"
                say(f"{child.name} is ready")
            case "worker.progress":
                child.step = fields.get("step", "")
                say(f"{child.name}: {child.step}")

    async def stop_all(self) -> None:
        """SIGTERM to the gateway first, then to the workers; SIGKILL to whoever does not end in time, or in a hurry."""
        for children in (
            [c for c in self._children if c.name == "gateway"],
            [c for c in self._children if c.name != "gateway"],
        ):
            await asyncio.gather(*(self._end(child) for child in children))

    async def _end(self, child: Child) -> None:
        process = child.process
        if process is None or (process.returncode is not None and self._readers[child.name].done()):
            return  # its number may be another's by now
        if process.returncode is None:
            await self._terminate(child, process)
        await self._clear(child, process)

    async def _terminate(self, child: Child, process: Process) -> None:
        process.terminate()
        ended, hurried = asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((ended, hurried), timeout=_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        await asyncio.gather(hurried, return_exceptions=True)
        if not ended.done():
            say(
                f"{child.name} is killed" + ("" if self._hurry.is_set() else f": it did not stop within {_GRACE_S:g} s")
            )
            _kill_group(process)
        await ended


async def keep_running(
    run: Callable[[], Awaitable[str]],
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Run again whatever ends, after pauses that grow while it ends quickly; until cancelled, or until `run` raises.

    Args:  run: returns when it has ended, with what there is to say of that.
    """
    num_quick = 0
    while True:
        started_at = clock()
        end = await run()
        num_quick = 0 if clock() - started_at > _STEADY_S else num_quick
        pause_s = _RESTART_PAUSES_S[min(num_quick, len(_RESTART_PAUSES_S) - 1)]
        num_quick += 1
        say(f"{end}; starting it again in {pause_s:g} s")
        await pause(pause_s)


def _kill_group(process: Process) -> None:
    """Whatever is left of a child and of what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def read_line(stream: asyncio.StreamReader) -> bytes:
    """One line, or the first MiB of a longer one."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as exc:
        return exc.partial
    except asyncio.LimitOverrunError as exc:
        return await stream.readexactly(exc.consumed)


def _fields(line: str) -> dict[str, str]:
    """What one line of a log of ours says, in either format."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            return {str(key): str(value) for key, value in json.loads(line).items()}
    return {name: value.strip('"') for name, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)}


def _why(child: Child) -> str:
    """The child's own reason: its last line, without the log's decoration."""
    if not child.last_words:
        return "it said nothing"
    last = child.last_words[-1]
    fields = _fields(last) if "event" in last else {}
    return fields.get("reason") or fields.get("error") or last.removeprefix("headrace: ")


def ending(name: str, status: int, why: str) -> str:
    """How a process ended; one that got SIGKILL had no time to say why."""
    if status == -signal.SIGKILL:
        return f"{name} was killed by SIGKILL (as the kernel does when memory runs out)"
    return f"{name} ended with status {status}: {why}"


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
