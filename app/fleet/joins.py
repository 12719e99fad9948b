"""Who is told when a worker comes up for routing."""

from collections.abc import Callable

from planes.wire.messages import WorkerId

OnJoined = Callable[[WorkerId], None]


class JoinWatchers:
    """Those that wait for a worker: few, and only after a failure."""

    def __init__(self) -> None:
        self._watchers: dict[object, OnJoined] = {}

    def watch(self, on_joined: OnJoined) -> Callable[[], None]:
        """Call `on_joined` with each worker that joins.  Returns: what ends that."""
        key = object()
        self._watchers[key] = on_joined

        def unwatch() -> None:
            del self._watchers[key]

        return unwatch

    def tell(self, worker: WorkerId) -> None:
        """A worker has joined. Whoever is told may end its own watch."""
        for on_joined in list(self._watchers.values()):
            on_joined(worker)
