"""The four ways a request can end badly; every other error of ours is a kind of one of them."""

import copyreg
from typing import Any

from planes.wire.urls import redacted

UNUSABLE_GRAMMAR = "unusable_grammar"
"""Code of an InvalidRequest that only a worker can tell: what the answer must match cannot be compiled."""
UNSUPPORTED = "unsupported"
"""Likewise: the engine, or the model's parser, does not take what the client asks."""
TOLD_BY_WORKERS = frozenset({UNUSABLE_GRAMMAR, UNSUPPORTED})
"""Codes of an InvalidRequest that is the client's mistake though the gateway has not found it."""
ROLE_CHANGED = "role_changed"
"""Code of what a worker will not do, or not go on with, because of its role: it is well, and others do it."""


class HeadraceError(Exception):
    """Base of all errors that a request or a process can end with."""

    code = "internal_error"
    """Label for metrics and OpenAI's `error.code`; a fixed word, never data."""

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process as it is: pickle would call `__init__`, which takes what the message was made of."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def for_client(self) -> str:
        """The message, without the words of exceptions and peers that are not ours: those belong in the log."""
        return str(self)


class InvalidRequest(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """The client's mistake; sending it again changes nothing. `param` names the field."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class Rejected(HeadraceError):  # noqa: N818
    """No worker has begun; the request may be sent again, here or elsewhere. `retry_after_s`: a guess, or None."""

    code = "rejected"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Interrupted(HeadraceError):  # noqa: N818
    """A worker had begun and was lost or failed; migration continues it elsewhere."""

    code = "interrupted"


class Expired(HeadraceError):  # noqa: N818
    """The request's time was over, whether a worker had begun or not. Nothing was wrong with it, or with a worker."""

    code = "deadline"


class UnusableSetting(HeadraceError):  # noqa: N818 - names what is wrong
    """A setting that no start can use. The message names the setting, its value and what is allowed."""

    code = "unusable_setting"

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"--{name.replace('_', '-')} is {redacted(repr(value))}: {allowed}")
