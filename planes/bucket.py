"""A JetStream stream as storage: one message a subject that matters, read by subject and number.

What JetStream's object store and its key-value store have in common (ADR-20 and ADR-8 of
nats-architecture-and-design). The server may be somebody else's: a stream that is there is used as it has been set up,
one that is gone is made anew, and whoever reads or stores looks again from time to time whether it is still there.
"""

import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import structlog

from planes.events import EventPlane, EventPlaneUnavailable, JetStreamRefused, NobodyListens
from planes.wire.errors import HeadraceError

_log = structlog.get_logger()

Result = TypeVar("Result")

_NO_MESSAGE, _NO_STREAM = 10037, 10059
_NOT_ENABLED: Final = (10039, 10076)
"""For an account, or for the server."""
_NO_ROOM: Final = (10002, 10023, 10028, 10047, 10122)
"""A stream may not be as large as it was to be: by the account's limits, by the server's, or for want of disk."""
_LEAST_BYTES: Final = 1 << 20
_MARK: Final = "headrace"


class ObjectMissing(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """Nothing is stored under this name."""

    code = "object_missing"


class NoJetStream(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """NATS is there and its JetStream is not."""

    code = "no_jetstream"

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"NATS answers without JetStream, where {what} are kept: run nats-server with -js (headrace nats does) "
            f"or put jetstream {{}} into its configuration, and allow it to this account ({reason})"
        )


class StoreUnusable(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """There is a stream of the store's name that cannot hold it."""

    code = "store_unusable"


class Bucket:
    """One stream. Every method raises EventPlaneUnavailable, after 5 s without an answer.

    config: of the stream to make where there is none. `max_bytes` in it is a wish: where the server has no room for so
    many, half as many are asked for, and so on.  what: is kept in it, for errors.
    """

    def __init__(self, plane: EventPlane, config: Mapping[str, Any], *, what: str) -> None:
        self.plane = plane
        self.stream: str = config["name"]
        self._config = {**config, "metadata": {_MARK: "1"}}
        self._what = what
        self._is_ensured = False
        self._is_direct = True
        """Whether the stream may be read past its leader."""
        plane.on_connect(self.look_again)

    async def read(self, subject: str, seq: int = 1) -> tuple[bytes, int, Mapping[str, str]]:
        """The first message on `subject`, which may be a pattern, from number `seq` on; its number; its headers.

        Raises:  ObjectMissing; NoJetStream, StoreUnusable.
        """
        try:
            return await self._anew(lambda: self._read(subject, seq))
        except JetStreamRefused as exc:
            if exc.err_code != _NO_MESSAGE:
                raise
            raise ObjectMissing(f"nothing on {subject}") from exc

    async def write(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Store a message; on return it is there.  Raises:  JetStreamRefused; NoJetStream, StoreUnusable."""
        await self._anew(lambda: self.plane.store(subject, data, headers=headers))

    async def purge(self, subject: str) -> None:
        """Delete what is on `subject`, which may be a pattern."""
        await self.ensure()
        await self.plane.jetstream(f"STREAM.PURGE.{self.stream}", {"filter": subject})

    async def num_bytes(self) -> int:
        """What the stream holds."""
        await self.ensure()
        return int((await self.plane.jetstream(f"STREAM.INFO.{self.stream}"))["state"]["bytes"])

    def piece_bytes(self, limit: int) -> int:
        """How long a message may be that the server takes, `limit` at most."""
        return max(1, min(limit, self.plane.max_message_bytes // 2))

    def look_again(self) -> None:
        """The server may have lost its store."""
        self._is_ensured = False

    async def _anew(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """`call`, and once more if the stream turns out to have gone since somebody looked."""
        was_ensured = self._is_ensured
        await self.ensure()
        try:
            return await call()
        except NobodyListens:
            self.look_again()
            if not was_ensured:
                raise
            await self.ensure()
            return await call()
        except EventPlaneUnavailable:
            self.look_again()
            raise

    async def _read(self, subject: str, seq: int) -> tuple[bytes, int, Mapping[str, str]]:
        wanted = {"seq": seq, "next_by_subj": subject}
        if not self._is_direct:
            found = (await self.plane.jetstream(f"STREAM.MSG.GET.{self.stream}", wanted))["message"]
            headers = _headers(base64.b64decode(found.get("hdrs", ""))) | {"Nats-Subject": found["subject"]}
            return base64.b64decode(found.get("data", "")), int(found["seq"]), headers
        call = f"$JS.API.DIRECT.GET.{self.stream}"
        reply = await self.plane.request(call, json.dumps(wanted).encode(), timeout_s=5.0)
        if reply.status is not None:
            self.look_again()
            raise ObjectMissing(f"nothing on {subject} (status {reply.status})")
        return reply.data, int(reply.headers["Nats-Sequence"]), reply.headers

    async def ensure(self) -> None:
        """The stream is there.  Raises:  NoJetStream, StoreUnusable."""
        if self._is_ensured:
            return
        try:
            self._is_direct = await self._adopt()
        except JetStreamRefused as exc:
            if exc.err_code in _NOT_ENABLED:
                raise NoJetStream(self._what, str(exc)) from exc
            raise
        except EventPlaneUnavailable as exc:
            if self.plane.is_connected:
                raise NoJetStream(self._what, str(exc)) from exc
            raise
        self._is_ensured = True

    async def _adopt(self) -> bool:
        """Use the stream that is there as it is, or make it.  Returns: whether it may be read directly."""
        try:
            config = (await self.plane.jetstream(f"STREAM.INFO.{self.stream}"))["config"]
        except JetStreamRefused as exc:
            if exc.err_code != _NO_STREAM:
                raise
            config = await self._make()
        else:
            config = await self._brought_up_to_date(config)
        listening, subjects = config.get("subjects", []), self._config["subjects"]
        if not all(any(covers(pattern, subject) for pattern in listening) for subject in subjects):
            raise StoreUnusable(
                f"the stream {self.stream} takes {listening}, not {subjects}: give it these subjects, or delete it"
            )
        return bool(config.get("allow_direct", False))

    async def _make(self) -> dict[str, Any]:
        wanted = dict(self._config)
        while True:
            try:
                made: dict[str, Any] = (await self.plane.jetstream(f"STREAM.CREATE.{self.stream}", wanted))["config"]
            except JetStreamRefused as exc:
                if exc.err_code not in _NO_ROOM or wanted["max_bytes"] < 2 * _LEAST_BYTES:
                    raise
                wanted["max_bytes"] //= 2
            else:
                if wanted["max_bytes"] != self._config["max_bytes"]:
                    _log.warning("store.small", stream=self.stream, bytes=wanted["max_bytes"])
                return made

    async def _brought_up_to_date(self, config: dict[str, Any]) -> dict[str, Any]:
        """A stream that we have made follows our settings; somebody else's is left alone."""
        limits = ("max_age", "max_bytes")
        if _MARK not in config.get("metadata", {}) or all(
            config.get(name, 0) == self._config.get(name, config.get(name, 0)) for name in limits
        ):
            return config
        try:
            wanted = config | {name: self._config[name] for name in limits if name in self._config}
            updated: dict[str, Any] = (await self.plane.jetstream(f"STREAM.UPDATE.{self.stream}", wanted))["config"]
        except JetStreamRefused as exc:
            _log.warning("store.not_updated", stream=self.stream, reason=str(exc))
            return config
        return updated


def covers(pattern: str, subject: str) -> bool:
    """Whether all that a subject stands for falls under a pattern, both with NATS's wildcards."""
    wide, narrow = pattern.split("."), subject.split(".")
    for index, part in enumerate(wide):
        if part == ">":
            return len(narrow) > index
        if index >= len(narrow) or narrow[index] == ">" or part not in ("*", narrow[index]):
            return False
    return len(wide) == len(narrow)


def _headers(block: bytes) -> dict[str, str]:
    """Of a message, as JetStream's JSON has them: `NATS/1.0`, then a line each."""
    lines = block.decode("utf-8", "replace").split("\r\n")[1:]
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
