"""Stop strings in text that arrives piece by piece: nothing leaves that could turn out to begin one."""

from collections.abc import Sequence


class StopFinder:
    """Cuts a text at the first stop string; behind it if `is_kept`.

    Everything let go can no longer be part of a stop string, so what is held is shorter than the longest of them.
    """

    __slots__ = ("_held", "_is_kept", "_starts", "_stops", "found")

    def __init__(self, stops: Sequence[str], *, is_kept: bool = False) -> None:
        self._is_kept = is_kept
        self._stops = [_Stop(stop) for stop in stops]
        self._starts = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.found = ""
        """The stop string that cut the text."""

    def advance(self, text: str) -> str:
        """Add `text`. Returns what may leave now; with `found`, that is all up to the cut."""
        if not self._held and self._starts.isdisjoint(text):
            return text  # the common case
        held, place = self._held + text, len(self._held)
        ends = [
            (place + end - len(stop.string), stop.string)
            for stop in self._stops
            if (end := stop.advance(text)) is not None
        ]
        if ends:
            start, self.found = min(ends)
            self.flush()
            return held[: start + len(self.found) * self._is_kept]
        keep = max(stop.num_matched for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text ended without a stop string: returns what was held."""
        held, self._held = self._held, ""
        for stop in self._stops:
            stop.num_matched = 0
        return held


class _Stop:
    """How far a text has come into one stop string, by its prefix function (Knuth, Morris and Pratt, 1977).

    Whatever is held, a character takes a step or two. The function is worked out as far as a text has come.
    """

    __slots__ = ("_borders", "num_matched", "string")

    def __init__(self, string: str) -> None:
        self.string = string
        self.num_matched = 0
        """Length of the longest beginning of the string that the text ends with."""
        self._borders = [0, 0]
        """For each length of a beginning: of the longest shorter one that it ends with."""

    def advance(self, text: str) -> int | None:
        """The place in `text` behind the string's first end, if it has one there."""
        borders, num_matched = self._borders, self.num_matched
        for end, char in enumerate(text, 1):
            num_matched = self._matched(num_matched, char)
            if num_matched == len(self.string):
                return end
            if num_matched == len(borders):
                borders.append(self._matched(borders[-1], char))
        self.num_matched = num_matched
        return None

    def _matched(self, num_matched: int, char: str) -> int:
        """As many as match when `char` follows so many."""
        while num_matched and self.string[num_matched] != char:
            num_matched = self._borders[num_matched]
        return num_matched + (self.string[num_matched] == char)
