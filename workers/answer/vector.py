"""The answer to a request for a prompt's vector: it is no text, and comes in one piece. See `formatter.py` for text."""

from planes.wire.frames import FinishReason, Usage
from workers.engine.base import EngineOutput


class VectorAnswer:
    """As much of a `Formatter` as such an answer needs."""

    completion_tokens = reasoning_tokens = 0

    def __init__(self) -> None:
        self.finish_reason: FinishReason | None = None
        self._vector = b""

    def feed(self, output: EngineOutput) -> tuple[bytes, tuple[int, ...]]:
        """Nothing is due before the end."""
        self.finish_reason, self._vector = output.finish, output.embedding
        return b"", ()

    def finish(self, usage: Usage) -> bytes:
        """The vector, as the engine gave it."""
        del usage  # the prompt's length is known to whoever asked
        return self._vector
