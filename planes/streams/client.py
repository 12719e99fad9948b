"""The gateway's end of a stream."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
import structlog

from planes.streams.greeting import MIN_NONCE_BYTES, StreamKeys, gateway_proof, is_proof, new_nonce, worker_proof
from planes.streams.peer import Peer
from planes.streams.protocol import FROM_WORKER, TOO_DEEP, ProtocolError, StreamLimits, framed
from planes.wire.errors import Interrupted, Rejected
from planes.wire.frames import (
    Cancel,
    Challenge,
    Delta,
    Done,
    Failed,
    FromWorker,
    Generate,
    Hello,
    Introduction,
    Ping,
    Pong,
    Release,
    Step,
    StreamId,
)
from planes.wire.messages import Registration, RequestId, WorkerId

_log = structlog.get_logger()

_REST_S: Final = 10.0
"""So long the last word on a cancelled stream is waited for."""


class WorkerUnreachable(Rejected):
    """The worker could not be asked; it has seen nothing of the request."""

    code = "worker_unreachable"

    def __init__(self, worker: WorkerId, reason: str) -> None:
        super().__init__(f"worker {worker} cannot be reached: {reason}")
        self.worker = worker


class WorkerLost(Interrupted):
    """The connection ended while the worker had the request."""

    code = "worker_lost"

    def __init__(self, worker: WorkerId, reason: str) -> None:
        super().__init__(f"worker {worker} was lost: {reason}")
        self.worker = worker


class Sink(Protocol):
    """Where one request's news go. Called on the event loop, in order; must neither block nor raise.

    Nothing follows `on_done`, `on_failed` or `on_lost`.
    """

    def on_delta(self, payload: bytes, tokens: list[int]) -> None: ...
    def on_done(self, done: Done) -> None: ...
    def on_failed(self, failed: Failed) -> None: ...
    def on_lost(self, error: WorkerLost) -> None: ...


class WorkerConnection(Peer):
    """The gateway's end of the stream to one worker. Made by `open`; when it ends, a new one is made."""

    def __init__(self, worker: WorkerId, epoch: int, limits: StreamLimits, *, token: bytes | None = None) -> None:
        super().__init__(limits, FROM_WORKER)
        self.worker = worker
        self._token = token
        self._nonce = new_nonce()
        self._challenge: bytes | None = None
        """The worker's nonce, which has been answered."""
        self._epoch = epoch
        self._decode = msgspec.msgpack.Decoder(FromWorker).decode
        self._sinks: dict[StreamId, Sink] = {}
        self._rests: dict[StreamId, Callable[[Done], None]] = {}
        """Who waits for the last word on a cancelled stream."""
        self._posted: list[bytes] = []
        self._next_stream = 1

    @classmethod
    async def open(
        cls,
        worker: WorkerId,
        epoch: int,
        address: str,
        *,
        timeout_s: float,
        limits: StreamLimits | None = None,
        keys: StreamKeys | None = None,
    ) -> "WorkerConnection":
        """Connect and hear the worker's Hello.

        Args:  address: host:port.  timeout_s: for both.  keys: None: the fleet's streams are open.
        Raises:  WorkerUnreachable, also when another worker or another epoch answers at `address`.
        """
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        keys = keys or StreamKeys()
        connection = cls(worker, epoch, limits or StreamLimits(), token=keys.token)
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(
                    lambda: connection,
                    host.strip("[]"),
                    int(port),
                    ssl=keys.to_worker,
                )
                await connection._greeting()
        except TimeoutError as exc:
            raise WorkerUnreachable(worker, f"no answer from {address} within {timeout_s:g} s") from exc
        except (OSError, ValueError) as exc:
            raise WorkerUnreachable(worker, f"{address}: {exc}") from exc
        return connection

    async def _greeting(self) -> None:
        try:
            await self.greeted
        except asyncio.CancelledError:
            self.close()
            raise

    @property
    def peer_name(self) -> str:
        return self.worker

    @property
    def num_streams(self) -> int:
        return len(self._sinks)

    def start(self, request: Generate, sink: Sink) -> StreamId:
        """Send `request` under a stream id of this connection's choosing (`request.stream` is overwritten).

        Raises:  WorkerUnreachable if the connection has ended, or the request does not fit a frame.
        """
        if self._transport.is_closing():
            raise WorkerUnreachable(self.worker, self._reason or "the connection is closing")
        stream = StreamId(self._next_stream)
        self._next_stream += 1
        try:
            self._post(msgspec.structs.replace(request, stream=stream))
        except ProtocolError as exc:
            raise WorkerUnreachable(self.worker, str(exc)) from exc
        self._sinks[stream] = sink
        return stream

    def cancel(self, stream: StreamId, on_rest: Callable[[Done], None] | None = None) -> None:
        """The sink hears nothing more. Streams that have ended are ignored.

        on_rest: called with the worker's last word, what it has used in all, if it says so; older ones do not.
        """
        if self._sinks.pop(stream, None) is None:
            return
        self._post(Cancel(stream))
        if on_rest is not None:
            self._rests[stream] = on_rest
            self._loop.call_later(_REST_S, self._rests.pop, stream, None)

    def release(self, request: RequestId) -> None:
        """The worker need not keep what it has for the decode leg of this request, which has been handed over."""
        self._post(Release(request))

    def _post(self, message: Generate | Cancel | Release) -> None:
        """Send with everything else that is posted in this turn of the event loop: each write is a system call.

        Raises:  ProtocolError if the message is longer than a frame may be.
        """
        self._posted.append(framed(message, self._limits.max_frame_bytes))
        if len(self._posted) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        posted, self._posted = self._posted, []
        if posted:
            self._write(b"".join(posted))

    def close(self) -> None:
        """End the connection after what has been posted; its sinks hear `on_lost`."""
        self._reason = self._reason or "closed by this gateway"
        self._flush()
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            try:
                sink.on_lost(WorkerLost(self.worker, self._reason))
            except Exception:  # noqa: BLE001 - the others are to hear of it, too
                _log.exception("stream.defect", worker=self.worker)

    def _received(self, frames: list[memoryview]) -> None:
        steps = []
        for frame in frames:
            try:
                message = self._decode(frame)
            except RecursionError as exc:
                raise ProtocolError(TOO_DEEP) from exc
            except msgspec.ValidationError as exc:
                self._pass_over(frame, exc)
                continue
            if type(message) is Step and self._is_known:
                steps.append(message)
            elif type(message) is Ping:
                self._send(Pong())
            elif type(message) is Hello:
                self._heard(message)
            elif type(message) is Challenge:
                self._challenged(message)
        if steps:
            self._stepped(steps[0] if len(steps) == 1 else _joined(steps))

    def _stepped(self, step: Step) -> None:
        sinks = self._sinks
        for delta in step.deltas:
            sink = sinks.get(delta.stream)
            if sink is not None:
                try:
                    sink.on_delta(delta.payload, delta.tokens)
                except Exception:  # noqa: BLE001 - logged there
                    self.cancel(delta.stream)
                    self._defective(sink)
        for done in step.done:
            self._done(done)
        for failed in step.failed:
            sink = sinks.pop(failed.stream, None)
            if sink is not None:
                try:
                    sink.on_failed(failed)
                except Exception:  # noqa: BLE001 - logged there
                    self._defective(sink)

    def _done(self, done: Done) -> None:
        sink = self._sinks.pop(done.stream, None)
        if sink is None:
            self._rested(done)
            return
        try:
            sink.on_done(done)
        except Exception:  # noqa: BLE001 - logged there
            self._defective(sink)

    def _rested(self, done: Done) -> None:
        on_rest = self._rests.pop(done.stream, None)
        if on_rest is not None:
            try:
                on_rest(done)
            except Exception:  # noqa: BLE001 - its request has ended; the others go on
                _log.exception("stream.defect", worker=self.worker)

    def _defective(self, sink: Sink) -> None:
        """A defect of ours in one request's path: to be called while it is handled. The other requests go on."""
        _log.exception("stream.defect", worker=self.worker)
        self._loop.call_soon(sink.on_lost, WorkerLost(self.worker, "its news could not be passed on"))

    def _challenged(self, challenge: Challenge) -> None:
        if self._is_known or self._challenge is not None:
            raise ProtocolError("the worker asks for a proof a second time")
        if self._token is None:
            raise ProtocolError("the worker asks for the fleet's token; --stream-token-file names none here")
        if len(challenge.nonce) < MIN_NONCE_BYTES:
            raise ProtocolError(f"the worker's nonce has {len(challenge.nonce)} bytes, fewer than {MIN_NONCE_BYTES}")
        self._challenge = challenge.nonce
        proof = gateway_proof(self._token, of_worker=challenge.nonce, of_gateway=self._nonce)
        self._send(Introduction(self._nonce, proof))

    def _heard(self, hello: Hello) -> None:
        if (hello.worker, hello.epoch) != (self.worker, self._epoch):
            self._reason = (
                f"{hello.worker} of epoch {hello.epoch} answers there; wanted {self.worker} of epoch {self._epoch}"
            )
            self._transport.abort()
        elif not self._is_known:
            if self._token is not None and not self._has_proved(hello, self._token):
                raise ProtocolError("whoever answers there has not proved that it knows the fleet's token")
            self._now_known()

    def _has_proved(self, hello: Hello, token: bytes) -> bool:
        if self._challenge is None:
            return False
        nonces = {"of_worker": self._challenge, "of_gateway": self._nonce}
        return is_proof(hello.proof, worker_proof(token, **nonces, worker=hello.worker, epoch=hello.epoch))


def _joined(steps: list[Step]) -> Step:
    """What several steps had, as one: a gateway that lags behind hands each client one piece, not one for each step."""
    deltas: dict[StreamId, list[Delta]] = {}
    for step in steps:
        for delta in step.deltas:
            deltas.setdefault(delta.stream, []).append(delta)
    return Step(
        [run[0] if len(run) == 1 else _joined_deltas(run) for run in deltas.values()],
        [done for step in steps for done in step.done],
        [failed for step in steps for failed in step.failed],
    )


def _joined_deltas(run: list[Delta]) -> Delta:
    tokens = [token for delta in run for token in delta.tokens]
    return Delta(run[0].stream, b"".join([delta.payload for delta in run]), tokens)


async def greets(worker: Registration, *, keys: StreamKeys | None = None, timeout_s: float = 5.0) -> bool:
    """Whether this very worker, of this epoch, greets who connects to its address."""
    try:
        connection = await WorkerConnection.open(
            worker.worker, worker.epoch, worker.address, timeout_s=timeout_s, keys=keys
        )
    except WorkerUnreachable:
        return False
    connection.close()
    return True
