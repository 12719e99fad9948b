"""What uvicorn makes for every connection, made when it is needed: of 20,000 open streams, few need it."""

import asyncio
from typing import Literal, TypeVar

_Item = TypeVar("_Item")


class LateEvent:
    """As `asyncio.Event`, whose queue of waiters takes 700 bytes: this has one once somebody waits."""

    __slots__ = ("_event", "_is_set")

    def __init__(self, *, is_set: bool = False) -> None:
        self._is_set = is_set
        self._event: asyncio.Event | None = None

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        if self._event is not None:
            self._event.set()

    def clear(self) -> None:
        self._is_set = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> Literal[True]:
        """Until it is set."""
        if self._is_set:
            return True
        if self._event is None:
            self._event = asyncio.Event()
        return await self._event.wait()


class ShortQueue(list[_Item]):
    """As a deque, which takes 600 bytes when it is empty, for a few items."""

    __slots__ = ()

    def appendleft(self, item: _Item) -> None:
        self.insert(0, item)

    def popleft(self) -> _Item:
        return self.pop(0)
