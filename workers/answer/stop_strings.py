"""Stop strings in text that arrives piece by piece: nothing leaves that could turn out to begin one."""

from collections.abc import Sequence


class StopFinder:
    """Cuts a text at the first stop string; behind it if `is_kept`.

    Everything let go can no longer be part of a stop string, so what is held is shorter than the longest of them.
    """

    __slots__ = ("_held", "_is_kept", "_starts", "_stops", "found")

    def __init__(self, stops: Sequence[str], *, is_kept: bool = False) -> None:
        self._is_kept = is_kept
        self._stops = tuple(stops)
        self._starts = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.found = ""
        """The stop string that cut the text."""

    def advance(self, text: str) -> str:
        """Add `text`. Returns what may leave now; with `found`, that is all up to the cut."""
        if not self._held and self._starts.isdisjoint(text):
            return text  # the common case
        held = self._held + text
        ends = [(start, stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if ends:
            start, self.found = min(ends)
            self._held = ""
            return held[: start + len(self.found) * self._is_kept]
        keep = max(overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text ended without a stop string: returns what was held."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
