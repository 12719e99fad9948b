"""Wishes for the roles of running workers, in etcd: `/headrace/{namespace}/roles/{worker}`.

A wish stands beside the registration that answers it: the worker watches the key, and says in its registration what
has become of it. It names the epoch of the life that it is meant for, so a later life of the worker passes over it. It
is no message that could be lost: whoever was cut off from etcd reads it afterwards, within an hour.
"""

from collections.abc import Callable

import msgspec
import structlog

from planes.control import Etcd, watch_keys
from planes.election import Candidate
from planes.wire.messages import RoleWish, WorkerId
from planes.wire.names import check_namespace
from planes.wire.unreadable import UNREADABLE

_log = structlog.get_logger()

_TTL_S = 3600
"""By then it has been heard or its worker has gone; nobody else would take it away."""


async def put_role_wish(etcd: Etcd, namespace: str, worker: WorkerId, wish: RoleWish) -> None:
    """Wish for a worker's role, in place of an earlier wish.  Raises:  ControlPlaneUnavailable."""
    async with etcd.session() as client:
        lease = await client.lease(_TTL_S)
        await client.put(_prefix(namespace) + worker.encode(), msgspec.json.encode(wish), lease)


async def put_holders_wish(candidate: Candidate, namespace: str, worker: WorkerId, wish: RoleWish) -> None:
    """The same, as the holder of an office: no wish by hand that stands for this life of the worker is replaced.

    Raises:  OfficeLost, ControlPlaneUnavailable.
    """

    def may(standing: bytes | None) -> bool:
        try:
            found = None if standing is None else msgspec.json.decode(standing, type=RoleWish)
        except UNREADABLE:
            return True
        return found is None or found.epoch != wish.epoch or not found.is_pin

    await candidate.act(_prefix(namespace) + worker.encode(), msgspec.json.encode(wish), ttl_s=_TTL_S, may=may)


async def watch_role_wishes(
    etcd: Etcd, namespace: str, on_wish: Callable[[WorkerId, RoleWish | None], None], *, worker: WorkerId | None = None
) -> None:
    """Call `on_wish` with each wish that stands, and each that comes (None: it is gone), until cancelled.

    Args:  worker: of this one alone; None: of all.  An unreadable wish is passed over.
    """
    prefix, decoder = _prefix(namespace), msgspec.json.Decoder(RoleWish)

    def take(key: bytes, value: bytes | None) -> None:
        name = WorkerId(key[len(prefix) :].decode(errors="replace"))
        try:
            on_wish(name, None if value is None else decoder.decode(value))
        except UNREADABLE as exc:
            _log.warning("role_wish.malformed", worker=name, reason=str(exc))

    key = prefix + (worker or "").encode()
    await watch_keys(etcd, "role_wishes", key, take, is_prefix=worker is None)


def _prefix(namespace: str) -> bytes:
    return f"/headrace/{check_namespace(namespace)}/roles/".encode()
