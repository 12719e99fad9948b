"""Virtual time, with the names that an event loop has."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any


class Timer:
    """A call to come."""

    __slots__ = ("_args", "_call")

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._call: Callable[..., Any] | None = call
        self._args = args

    def cancel(self) -> None:
        self._call, self._args = None, ()

    def fire(self) -> None:
        if self._call is not None:
            self._call(*self._args)


class Clock:
    """Calls happen in order of their instant, and of their making where instants are equal."""

    def __init__(self) -> None:
        self.now = 0.0
        self._soon: deque[Timer] = deque()
        self._calls: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[..., Any], *args: Any) -> Timer:
        """After the present call, before anything else."""
        timer = Timer(call, args)
        self._soon.append(timer)
        return timer

    def call_at(self, instant: float, call: Callable[..., Any], *args: Any) -> Timer:
        timer = Timer(call, args)
        heapq.heappush(self._calls, (max(instant, self.now), next(self._order), timer))
        return timer

    def call_later(self, delay: float, call: Callable[..., Any], *args: Any) -> Timer:
        return self.call_at(self.now + delay, call, *args)

    def run(self, *, until: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Go on until `is_over`, or until this instant."""
        soon, calls = self._soon, self._calls
        while not is_over():
            if soon:
                soon.popleft().fire()
            elif calls and calls[0][0] <= until:
                self.now, _, timer = heapq.heappop(calls)
                timer.fire()
            else:
                self.now = max(self.now, until)
                return
