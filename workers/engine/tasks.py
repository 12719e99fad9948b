"""What engines do alike whose requests are tasks of this process: who runs here, and what must not end meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from planes.wire.errors import UNSUPPORTED, InvalidRequest
from planes.wire.frames import FinishReason
from planes.wire.messages import RequestId
from workers.engine.base import EngineOutput, EngineRequest


@dataclass(slots=True, eq=False, kw_only=True)
class ActiveRequest:
    """One request on its way. Engines add what they know of it."""

    request: EngineRequest
    on_output: Callable[[EngineOutput], None]
    unfinished: set[int]
    """Choices whose end nobody has been told."""
    task: asyncio.Task[None] | None = None


Active = TypeVar("Active", bound=ActiveRequest)


class ActiveRequests(Generic[Active]):
    """Those that an engine has taken, and the tasks of those that it was told to forget."""

    def __init__(self) -> None:
        self._active: dict[RequestId, Active] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._active)

    def __iter__(self) -> Iterator[Active]:
        return iter(self._active.values())

    def __contains__(self, active: Active) -> bool:
        return self._active.get(active.request.request) is active

    def get(self, request: RequestId) -> Active | None:
        return self._active.get(request)

    def check(self, request: EngineRequest) -> None:
        """Raises:  InvalidRequest for one that runs already, or that only the simulated engine could serve."""
        if request.request in self._active:
            raise InvalidRequest(f"the request {request.request} runs here already", param="request")
        if request.sampling.script:
            message = "only the simulated engine says what it is told"
            raise InvalidRequest(message, param="x-headrace-script", code=UNSUPPORTED)

    def begin(self, active: Active, work: Coroutine[Any, Any, None]) -> None:
        """Take one in; `work` answers it, and calls `ended` at its end."""
        self._active[active.request.request] = active
        active.task = asyncio.create_task(work)

    def ended(self, active: Active) -> None:
        """It is over, unless another one has its name by now."""
        if active in self:
            del self._active[active.request.request]

    async def refuse(self, active: Active, error: str) -> None:
        """Work for `begin` that answers with an error alone."""
        self.fail(active, error)

    def fail(self, active: Active, error: str, *, refusal: InvalidRequest | None = None) -> None:
        """End each of its choices that has not ended."""
        self._active.pop(active.request.request, None)
        for index in sorted(active.unfinished):
            active.on_output(EngineOutput(index, (), finish=FinishReason.ERROR, error=error, refusal=refusal))
        active.unfinished.clear()

    def abort(self, request: RequestId) -> Active | None:
        """Forget one; nothing more is said of it.  Returns:  the one, if it was there."""
        active = self._active.pop(request, None)
        if active is not None:
            active.unfinished.clear()
            self.cancel(active)
        return active

    def cancel(self, active: Active) -> None:
        """End its task, which is kept until it has ended."""
        if active.task is not None and not active.task.done():
            self._ending.add(active.task)
            active.task.add_done_callback(self._ending.discard)
            active.task.cancel()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return [active.task for active in self if active.task is not None] + [*self._ending]


class LastingWork:
    """Tasks that an engine cannot go on without: the failure of one is its death, which is told once."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death
        self.is_ending = False
        """The engine stops, or is dead: nothing that ends now is news."""
        self.tasks: list[asyncio.Task[None]] = []

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it until the engine stops."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        self.tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.died(f"{type(error).__name__}: {error}")

    def died(self, reason: str) -> None:
        """The engine is gone."""
        if not self.is_ending:
            self.is_ending = True
            self._on_death(reason)


async def cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel all, and wait until they have ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
