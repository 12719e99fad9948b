"""The free text that a custom tool is given, out of the arguments of the function that it is shown to models as."""

_START = '{"input":"'
_AROUND = frozenset({0, 1, 8, 9})
"""Places in the above before which blanks may stand."""
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class CustomInput:
    """Reads `{"input": "…"}` piece by piece. What turns out to be anything else is handed on as it is."""

    __slots__ = ("_escape", "_high", "_is_over", "_is_raw", "_place", "_seen")

    def __init__(self) -> None:
        self._place = 0
        """In `_START`."""
        self._seen = ""
        """What has been read and may still turn out to be something else."""
        self._escape = ""
        """The beginning of an escape sequence."""
        self._high = ""
        """The first half of a character that JSON writes as two."""
        self._is_over = False
        self._is_raw = False

    def advance(self, text: str) -> str:
        """The input's next characters; whatever stands behind it is left out."""
        if self._is_raw:
            return text
        for position, char in enumerate(text):
            if self._place == len(_START):
                return self._inside(text[position:])
            self._seen += char
            if char == _START[self._place]:
                self._place += 1
            elif not (char.isspace() and self._place in _AROUND):
                self._is_raw = True
                return self._seen + text[position + 1 :]
        return ""

    def finish(self) -> str:
        """What is left if the arguments end here."""
        return "" if self._is_raw or self._place == len(_START) else self._seen

    def _inside(self, text: str) -> str:
        found: list[str] = []
        for char in text:
            if self._is_over:
                break
            if self._escape:
                found.append(self._unescaped(char))
            elif char == "\\":
                self._escape = char
            elif char == '"':
                self._is_over = True
                found.append(self._unpaired())
            else:
                found.append(self._unpaired() + char)
        return "".join(found)

    def _unescaped(self, char: str) -> str:
        self._escape += char
        if self._escape[1] != "u":
            self._escape = ""
            return self._unpaired() + _ESCAPES.get(char, char)
        if len(self._escape) < 6:
            return ""
        digits, self._escape = self._escape[2:], ""
        try:
            unit = int(digits, 16)
        except ValueError:
            return f"{self._unpaired()}\\u{digits}"
        if 0xDC00 <= unit < 0xE000 and self._high:
            pair, self._high = self._high + chr(unit), ""
            return pair.encode("utf-16", "surrogatepass").decode("utf-16")
        before = self._unpaired()
        if 0xD800 <= unit < 0xDC00:
            self._high = chr(unit)
            return before
        return before + ("\ufffd" if 0xDC00 <= unit < 0xE000 else chr(unit))

    def _unpaired(self) -> str:
        """What stands for the first half of a character whose second half has not followed."""
        high, self._high = self._high, ""
        return "\ufffd" if high else ""
