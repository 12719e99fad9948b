"""An office that one of several processes holds at a time, in etcd, and what the candidates tell each other.

    /headrace/{namespace}/{office}/holder          who holds it, and which term of it this is
    /headrace/{namespace}/{office}/told/{name}     what candidate `name` has to tell
    /headrace/{namespace}/{office}/done            what a holder did last

The first two stand under their candidate's lease: whoever dies, or is away from etcd for as long, loses the office, and
the next one to look takes it. That the former one knows is not relied upon: what the holder does it does in a
transaction that etcd carries out only while the office is still held in that very term. So two never act at once,
whatever their clocks and connections do.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

import structlog

from planes.control import ControlPlaneUnavailable, Etcd, renewed
from planes.wire.errors import HeadraceError
from planes.wire.names import check_namespace

_log = structlog.get_logger()

_REVOKE_TIMEOUT_S = 2.0


class OfficeLost(HeadraceError):  # noqa: N818 - names the outcome
    """Somebody else holds the office now, or what was to be changed has changed."""

    code = "office_lost"


class Candidate:
    """Runs for an office for as long as `run` does.  name: of this process, without a slash."""

    def __init__(
        self,
        etcd: Etcd,
        namespace: str,
        office: str,
        name: str,
        *,
        ttl_s: int = 6,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._etcd = etcd
        self._prefix = f"/headrace/{check_namespace(namespace)}/{office}/".encode()
        self._office, self._name, self._ttl_s, self._clock = office, name, ttl_s, clock
        self._lease: int | None = None
        self._term = b""
        self._until = 0.0
        """When its lease runs out, unless it is renewed."""

    @property
    def is_holder(self) -> bool:
        """As far as it knows; `act` asks etcd."""
        return bool(self._term) and self._clock() < self._until

    async def run(self) -> None:
        """Run for it, and hold it, until cancelled; then it is free at once."""
        try:
            await self._etcd.keep(self._office, self._campaign)
        finally:
            await self._resign()

    async def tell(self, value: bytes) -> None:
        """Put what the others shall know of this candidate, in place of what it told before.

        Nothing happens until the candidate is known to etcd.  Raises:  ControlPlaneUnavailable.
        """
        if self._lease is not None:
            async with self._etcd.session() as client:
                await client.put(self._prefix + b"told/" + self._name.encode(), value, self._lease)

    async def heard(self) -> dict[str, bytes]:
        """What all living candidates have told, by name.  Raises:  ControlPlaneUnavailable."""
        prefix = self._prefix + b"told/"
        async with self._etcd.session() as client:
            found = await client.get_prefix(prefix)
        return {entry.key[len(prefix) :].decode(errors="replace"): bytes(entry.value) for entry in found}

    async def act(self, key: bytes, value: bytes, *, ttl_s: int, may: Callable[[bytes | None], bool]) -> None:
        """Put `key` for `ttl_s` seconds, if the office is still held and `may` says yes to what is there.

        Raises:  OfficeLost if nothing was put; ControlPlaneUnavailable if that is not known.
        """
        async with self._etcd.session() as client:
            found = next(iter(await client.get_range(key, None)), None)
            if not may(None if found is None else bytes(found.value)):
                raise OfficeLost(f"{key.decode()} has been put by somebody who goes first")
            lease = (await client.lease(ttl_s)).id
            checks = [
                client.transactions.value(self._prefix + b"holder") == (self._term or b"-"),
                client.transactions.mod(key) == (0 if found is None else found.mod_revision),
            ]
            is_put, _ = await client.transaction(
                checks, success=[client.transactions.put(key, value, lease)], failure=[]
            )
            if not is_put:
                await client.revoke_lease(lease)
                raise OfficeLost(f"{self._office} is not held any more, or {key.decode()} has just changed")

    async def note(self, value: bytes, *, ttl_s: int) -> None:
        """Put what the holder did last.  Raises:  as `act`."""
        await self.act(self._prefix + b"done", value, ttl_s=ttl_s, may=lambda _: True)

    async def _campaign(self, client: Any, healthy: Callable[[], None]) -> None:
        while True:
            asked_at = self._clock()
            if self._lease is not None and not await renewed(client, self._lease):
                self._lost("its lease ran out")
                self._lease = None
            if self._lease is None:
                self._lease = (await client.lease(self._ttl_s)).id
            self._until = asked_at + self._ttl_s
            await self._stand(client)
            healthy()
            await asyncio.sleep(self._ttl_s / 3)

    async def _stand(self, client: Any) -> None:
        """Take the office if it is free, and notice if it is another's."""
        key = self._prefix + b"holder"
        found = next(iter(await client.get_range(key, None)), None)
        if found is not None:
            if found.lease == self._lease:
                self._won(bytes(found.value))  # also where etcd took it and its answer was lost
            else:
                self._lost("another one holds it")
            return
        term = f"{self._name}/{secrets.token_hex(8)}".encode()
        put = client.transactions.put(key, term, self._lease)
        is_won, _ = await client.transaction([client.transactions.create(key) == 0], success=[put], failure=[])
        if is_won:
            self._won(term)
        else:
            self._lost("another one took it")

    def _won(self, term: bytes) -> None:
        if term != self._term:
            _log.info("office.taken", office=self._office, name=self._name)
        self._term = term

    def _lost(self, reason: str) -> None:
        if self._term:
            _log.warning("office.lost", office=self._office, name=self._name, reason=reason)
        self._term = b""

    async def _resign(self) -> None:
        self._term = b""
        if self._lease is None:
            return
        try:
            async with asyncio.timeout(_REVOKE_TIMEOUT_S), self._etcd.session() as client:
                await client.revoke_lease(self._lease)
        except (ControlPlaneUnavailable, TimeoutError) as exc:
            _log.warning("lease.not_revoked", ttl_s=self._ttl_s, reason=str(exc))
        self._lease = None


def office_key(namespace: str, office: str) -> bytes:
    """Where what a holder did last is."""
    return f"/headrace/{check_namespace(namespace)}/{office}/done".encode()
