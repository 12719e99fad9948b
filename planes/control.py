"""The control plane: worker registrations and live settings in etcd. With `control_client.py`, the only user of aetcd.

Nothing here ends because etcd did. Work happens in sessions: one connection to one endpoint. Whatever fails ends the
session; after a pause the next one begins at the next endpoint, from what etcd says then:

    Registrar         renew the lease or get a new one, put the entry, look after both every third of the TTL
    WorkerDirectory   list, tell the difference to what was known, watch from that revision on
    watch_keys        the same for other keys

Of aetcd we use the calls and the generated stubs. Not its watcher: that does not notice a watch which
the server cancels, nor a stream that ends without an error, and its queue has no bound.
"""

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import aetcd
import msgspec
import structlog
from aetcd import rpc
from aetcd.utils import prefix_range_end

from planes.control_client import Client, EtcdKeys
from planes.security.planes import EtcdSecurity
from planes.wire.errors import HeadraceError, UnusableSetting
from planes.wire.messages import Registration, WorkerId
from planes.wire.names import check_namespace
from planes.wire.unreadable import UNREADABLE
from planes.wire.urls import parse_etcd

_log = structlog.get_logger()

_MAX_REFUSED = 1024
"""Unusable registrations that are remembered."""
_CHANNEL_OPTIONS = {
    # A silent peer is found within 15 s; etcd refuses pings more often than every 5 s.
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 5_000,
    "grpc.http2.ping_timeout_ms": 5_000,  # 60 s otherwise, whatever the line above says
    "grpc.http2.max_pings_without_data": 0,  # no limit: a quiet watch is what must be watched
    # A new connection must not inherit the growing pauses (up to 2 minutes) of the ones before it.
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_http_proxy": 0,
    "grpc.max_receive_message_length": -1,
}


class ControlPlaneUnavailable(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """etcd did not answer, or not as it should; may be tried again."""

    code = "control_plane_unavailable"


class WorkerIdTaken(UnusableSetting):
    """Another worker has this id, and runs."""

    code = "worker_id_taken"

    def __init__(self, other: Registration) -> None:
        super().__init__(
            "worker_id", other.worker, f"the worker at {other.address} has it; choose another, or stop that one first"
        )


IsRunning = Callable[[Registration], Awaitable[bool]]
"""Whether the worker that an entry tells of answers at its address; where it does not, its id may be taken over."""


class Etcd:
    """Where etcd is. Endpoints are used one at a time, the next one after a failure.

    url: `http[s]://[user:password@]host:port[,host:port…]`.  timeout_s: for one call.
    Raises:  ValueError for an unusable url or file.
    """

    def __init__(
        self,
        url: str,
        *,
        security: EtcdSecurity | None = None,
        timeout_s: float = 3.0,
        rng: random.Random | None = None,
    ) -> None:
        address = parse_etcd(url)
        self._endpoints = address.endpoints
        self._keys = EtcdKeys(address, security or EtcdSecurity())
        self._current = 0
        self._timeout_s = timeout_s
        self._rng = rng or random.Random()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        """A connected `aetcd.Client`.  Raises:  ControlPlaneUnavailable for every error of etcd inside the block."""
        used = self._current
        host, port = self._endpoints[used]
        client = Client(host, port, self._keys, timeout_s=self._timeout_s, options=_CHANNEL_OPTIONS)
        try:
            async with client:
                yield client
        except (aetcd.ClientError, rpc.AioRpcError) as exc:
            self._current = (used + 1) % len(self._endpoints)
            reason = exc.details() if isinstance(exc, rpc.AioRpcError) else str(exc)
            raise ControlPlaneUnavailable(f"etcd at {host}:{port}: {reason or type(exc).__name__}") from exc

    async def keep(self, name: str, work: Callable[[Any, Callable[[], None]], Awaitable[None]]) -> None:
        """Run `work(client, healthy)`, in a new session after each failure, until it returns.

        `work` calls `healthy` when etcd has done what was asked; the pause after the next failure is short again.
        """
        pauses = _pauses(self._rng)
        is_healthy = True

        def healthy() -> None:
            nonlocal pauses, is_healthy
            pauses = _pauses(self._rng)
            if not is_healthy:
                _log.info("etcd.back", user=name)
            is_healthy = True

        while True:
            try:
                async with self.session() as client:
                    return await work(client, healthy)
            except ControlPlaneUnavailable as exc:
                if is_healthy:
                    _log.warning("etcd.unavailable", user=name, reason=str(exc))
                is_healthy = False
            await asyncio.sleep(next(pauses))


class Registrar:
    """Keeps a worker's entry in etcd under a lease: while the process lives it is there, soon after it is not.

    An id belongs to one worker. At first the entry of one that does not answer any more is replaced; later an entry
    that is another's is left alone until it goes.
    """

    def __init__(
        self,
        etcd: Etcd,
        namespace: str,
        registration: Registration,
        *,
        is_running: IsRunning,
        ttl_s: int = 10,
        revoke_timeout_s: float = 2.0,
    ) -> None:
        self._etcd = etcd
        self._key = workers_prefix(namespace) + registration.worker.encode()
        self._registration = registration
        self._is_running = is_running
        self._ttl_s = ttl_s
        self._revoke_timeout_s = revoke_timeout_s
        self._lease: int | None = None
        self._changed = asyncio.Event()
        self._scope: asyncio.Timeout | None = None
        self._is_closed = False
        self._ended = asyncio.Event()
        self._ended.set()
        self._is_displaced = False
        self._is_told = asyncio.Event()
        self.registered = asyncio.Event()
        """Set once etcd has the entry for the first time."""

    def update(self, registration: Registration) -> None:
        """Publish this instead, as soon as etcd can be reached. Same worker."""
        self._registration = registration
        self._is_told.clear()
        self._changed.set()

    async def until_told(self) -> None:
        """Wait until etcd holds what `update` was given last."""
        await self._is_told.wait()

    async def run(self) -> None:
        """Register, and stay registered until `close` or cancellation; then the entry is removed at once.

        Raises:  WorkerIdTaken if at first another worker that runs has the id.
        """
        if self._is_closed:
            return
        self._ended.clear()
        try:
            async with asyncio.timeout(None) as self._scope:
                await self._etcd.keep("registrar", self._stay_registered)
        except TimeoutError:
            pass  # `close` said so: nothing else sets a deadline here
        finally:
            self._scope = None
            await self._revoke()
            self._ended.set()

    async def close(self) -> None:
        """End `run`; on return the entry is gone, or etcd was out of reach and the lease will run out."""
        self._is_closed = True
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.reschedule(asyncio.get_running_loop().time())
        await self._ended.wait()

    async def _stay_registered(self, client: Any, healthy: Callable[[], None]) -> None:
        while True:
            self._changed.clear()
            if self._lease is not None and not await renewed(client, self._lease):
                _log.warning("lease.expired", ttl_s=self._ttl_s)
                self._lease = None
            if self._lease is None:
                self._lease = (await client.lease(self._ttl_s)).id
            await self._put_entry(client)
            healthy()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._ttl_s / 3):
                    await self._changed.wait()

    async def _put_entry(self, client: Any) -> None:
        """Have etcd hold the registration as it now is, unless the entry is another's.  Raises:  WorkerIdTaken."""
        registration = self._registration
        value = msgspec.json.encode(registration)
        while True:
            found = await _entry(client, self._key)
            if found is not None and (found.value, found.lease) == (value, self._lease):
                break  # also where etcd took it and its answer was lost
            holder = None if found is None else _readable(found.value)
            if holder is not None and holder.epoch != registration.epoch:
                if self.registered.is_set():
                    self._displaced(holder)
                    return
                if await self._is_running(holder):
                    raise WorkerIdTaken(holder)
            is_unchanged = client.transactions.mod(self._key) == (0 if found is None else found.mod_revision)
            put = client.transactions.put(self._key, value, self._lease)
            is_put, _ = await client.transaction([is_unchanged], success=[put], failure=[])
            if is_put:
                _log.info("worker.registered", worker=registration.worker, state=registration.state)
                break
        self._is_displaced = False
        self.registered.set()
        self._told(registration)

    def _told(self, registration: Registration) -> None:
        if registration is self._registration:
            self._is_told.set()

    def _displaced(self, holder: Registration) -> None:
        if not self._is_displaced:
            _log.error("worker.displaced", worker=holder.worker, by=holder.address)
        self._is_displaced = True

    async def _revoke(self) -> None:
        if self._lease is None:
            return
        try:
            async with asyncio.timeout(self._revoke_timeout_s), self._etcd.session() as client:
                await client.revoke_lease(self._lease)
        except (ControlPlaneUnavailable, TimeoutError) as exc:
            _log.warning("lease.not_revoked", ttl_s=self._ttl_s, reason=str(exc))
        self._lease = None


async def check_id_is_free(etcd: Etcd, namespace: str, worker: WorkerId, *, is_running: IsRunning) -> None:
    """Before a start that takes long; the `Registrar` asks again.  Raises:  WorkerIdTaken, ControlPlaneUnavailable."""
    async with etcd.session() as client:
        found = await _entry(client, workers_prefix(namespace) + worker.encode())
    holder = None if found is None else _readable(found.value)
    if holder is not None and await is_running(holder):
        raise WorkerIdTaken(holder)


class WorkerDirectory:
    """The registered workers, as a gateway knows them.

    `on_up` is called for a new worker and for a changed registration, `on_down` for one that is gone. While etcd is
    out of reach nothing changes. What is missing afterwards is down only after `grace_s`: an etcd that came back
    empty, or let leases expire that nobody could renew, must not take a healthy fleet down.
    """

    def __init__(
        self,
        etcd: Etcd,
        namespace: str,
        *,
        on_up: Callable[[Registration], None],
        on_down: Callable[[WorkerId], None],
        grace_s: float = 15.0,
    ) -> None:
        self._etcd = etcd
        self._prefix = workers_prefix(namespace)
        self._on_up = on_up
        self._on_down = on_down
        self._grace_s = grace_s
        self._workers: dict[WorkerId, Registration] = {}
        self._missing: set[WorkerId] = set()
        self._refused: dict[WorkerId, str] = {}
        """Workers whose registration cannot be used, and why: that has been said."""
        self._grace: asyncio.TimerHandle | None = None
        self._decoder = msgspec.json.Decoder(Registration)
        self.is_current = False
        """Whether etcd can be reached and `workers` is what it says."""

    @property
    def workers(self) -> Mapping[WorkerId, Registration]:
        return MappingProxyType(self._workers)

    async def run(self) -> None:
        """Follow etcd until cancelled."""
        await self._etcd.keep("directory", self._follow)

    async def _follow(self, client: Any, healthy: Callable[[], None]) -> None:
        def listed(entries: dict[bytes, bytes]) -> None:
            self._take_listing(entries)
            self.is_current = True
            healthy()

        try:
            await _mirror(client, self._prefix, prefix_range_end(self._prefix), listed, self._take_change)
        finally:
            self.is_current = False
            if self._grace is not None:
                self._grace.cancel()

    def _take_listing(self, entries: dict[bytes, bytes]) -> None:
        for key, value in entries.items():
            self._take_change(key, value)
        self._missing = {worker for worker in self._workers if self._prefix + worker.encode() not in entries}
        if self._missing:
            _log.warning("fleet.missing", workers=sorted(self._missing), grace_s=self._grace_s)
            self._grace = asyncio.get_running_loop().call_later(self._grace_s, self._drop_missing)

    def _drop_missing(self) -> None:
        for worker in sorted(self._missing):
            self._drop(worker)

    def _drop(self, worker: WorkerId) -> None:
        self._missing.discard(worker)
        self._refused.pop(worker, None)
        if self._workers.pop(worker, None) is not None:
            self._on_down(worker)

    def _refuse(self, worker: WorkerId, reason: str) -> None:
        """Said once for as long as it stays wrong in the same way: whoever wrote it may write it every second."""
        if self._refused.get(worker) == reason:
            return
        if len(self._refused) >= _MAX_REFUSED:
            self._refused.pop(next(iter(self._refused)))
        self._refused[worker] = reason
        _log.warning("registration.malformed", worker=worker, reason=reason)

    def _take_change(self, key: bytes, value: bytes | None) -> None:
        worker = WorkerId(key[len(self._prefix) :].decode(errors="replace"))
        if value is None:
            self._drop(worker)
            return
        try:
            registration = self._decoder.decode(value)
        except UNREADABLE as exc:
            self._refuse(worker, str(exc))
            return
        if registration.worker != worker:
            self._refuse(worker, f"it names {registration.worker!r}")
            return
        self._refused.pop(worker, None)
        self._missing.discard(worker)
        if self._workers.get(worker) != registration:
            self._workers[worker] = registration
            self._on_up(registration)


async def watch_config(etcd: Etcd, namespace: str, on_change: Callable[[bytes | None], None]) -> None:
    """Call `on_change` with the settings (JSON, unchecked) that etcd holds now and after each change, until cancelled.

    None: they were deleted; nothing is called as long as there never were any.
    """
    await watch_keys(etcd, "config", config_key(namespace), lambda _, value: on_change(value))


async def watch_keys(
    etcd: Etcd,
    user: str,
    key: bytes,
    on_change: Callable[[bytes, bytes | None], None],
    *,
    is_prefix: bool = False,
    on_listed: Callable[[], None] | None = None,
) -> None:
    """Call `on_change` with what a key holds, or all keys with this prefix, now and after each change, until cancelled.

    None as a value: it is gone.  user: what the log calls whoever watches.  on_listed: called after each time that all
    which is there has been told.
    """
    end = prefix_range_end(key) if is_prefix else None
    known: dict[bytes, bytes] = {}

    def take(found: bytes, value: bytes | None) -> None:
        if value == known.get(found):
            return
        if value is None:
            del known[found]
        else:
            known[found] = value
        on_change(found, value)

    async def follow(client: Any, healthy: Callable[[], None]) -> None:
        def listed(entries: dict[bytes, bytes]) -> None:
            for found in known.keys() | entries.keys():
                take(found, entries.get(found))
            if on_listed is not None:
                on_listed()
            healthy()

        await _mirror(client, key, end, listed, take)

    await etcd.keep(user, follow)


async def get_workers(etcd: Etcd, namespace: str) -> dict[WorkerId, Registration]:
    """The registered workers; what no gateway could read is left out.  Raises:  ControlPlaneUnavailable."""
    prefix = workers_prefix(namespace)
    async with etcd.session() as client:
        found = await client.get_range(prefix, prefix_range_end(prefix))
    read = [_readable(entry.value) for entry in found]
    return {registration.worker: registration for registration in read if registration is not None}


async def get_config(etcd: Etcd, namespace: str) -> bytes | None:
    """The live settings of all gateways, unchecked; None: there are none.  Raises:  ControlPlaneUnavailable."""
    async with etcd.session() as client:
        found = await _entry(client, config_key(namespace))
        return None if found is None else bytes(found.value)


async def delete_config(etcd: Etcd, namespace: str) -> None:
    """Remove the live settings of all gateways, if there are any.  Raises:  ControlPlaneUnavailable."""
    async with etcd.session() as client:
        await client.delete(config_key(namespace))


async def put_config(etcd: Etcd, namespace: str, value: bytes) -> None:
    """Set the live settings of all gateways.  Raises:  ControlPlaneUnavailable."""
    async with etcd.session() as client:
        await client.put(config_key(namespace), value)


def workers_prefix(namespace: str) -> bytes:
    return f"/headrace/{check_namespace(namespace)}/workers/".encode()


def config_key(namespace: str) -> bytes:
    return f"/headrace/{check_namespace(namespace)}/config".encode()


async def _mirror(
    client: Any,
    start: bytes,
    end: bytes | None,
    on_listing: Callable[[dict[bytes, bytes]], None],
    on_change: Callable[[bytes, bytes | None], None],
) -> None:
    """Pass on every entry of the keys from `start` to before `end` (None: of the one key), then each change.

    Never returns; whatever ends the watch, compaction included, is raised for the next session to list again.
    """
    found = await client.get_range(start, end)
    on_listing({entry.key: entry.value for entry in found})
    # A member that lost its cluster would go on watching in silence; with this it says so.
    call = rpc.WatchStub(client.channel).Watch(metadata=(*(client.metadata or ()), ("hasleader", "true")))
    try:
        wanted = rpc.WatchCreateRequest(key=start, range_end=end, start_revision=found.header.revision + 1)
        await call.write(rpc.WatchRequest(create_request=wanted))
        async for response in call:
            if response.canceled:
                reason = response.cancel_reason or f"compacted up to revision {response.compact_revision}"
                raise aetcd.ClientError(f"watch cancelled: {reason}")
            for event in response.events:
                on_change(event.kv.key, event.kv.value if event.type == event.PUT else None)
        raise aetcd.ClientError("watch ended")
    finally:
        call.cancel()


async def _entry(client: Any, key: bytes) -> Any:
    """What etcd holds under `key`, an `aetcd.rtypes.KeyValue`, or None."""
    return next(iter(await client.get_range(key, None)), None)


def _readable(value: bytes) -> Registration | None:
    """The registration, or None if that is none: gateways pass over it, so nobody has the id."""
    try:
        return msgspec.json.decode(value, type=Registration)
    except UNREADABLE:
        return None


async def renewed(client: Any, lease: int) -> bool:
    """Whether the lease lives on, for its whole time."""
    reply = await client.refresh_lease(lease)
    return reply is not None and reply.TTL > 0


def _pauses(rng: random.Random) -> Iterator[float]:
    """Seconds to wait after each failure in a row: doubling from 0.1 to 5, spread so that not all come at once."""
    for attempt in itertools.count():
        yield rng.uniform(0.5, 1.0) * min(5.0, 0.1 * 2 ** min(attempt, 10))
