"""Who is told when something happens."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Watchers(Generic[T]):
    """Those that want to be told: few, and each for a while."""

    def __init__(self) -> None:
        self._watchers: dict[object, Callable[[T], None]] = {}

    def __len__(self) -> int:
        return len(self._watchers)

    def watch(self, on_news: Callable[[T], None]) -> Callable[[], None]:
        """Call `on_news` with all that is told from now on; it must not raise.  Returns: what ends that."""
        key = object()
        self._watchers[key] = on_news

        def unwatch() -> None:
            del self._watchers[key]

        return unwatch

    def tell(self, news: T) -> None:
        """Whoever is told may end its own watch."""
        if self._watchers:
            for on_news in list(self._watchers.values()):
                on_news(news)
