"""`headrace role`: asks a running worker to change its role (`workers/role.py`), and waits until it has.

What is asked for by hand is pinned: `--autorole` leaves that worker alone for as long as it lives, or until
`headrace role WORKER auto`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from planes.control import ControlPlaneUnavailable, Etcd, get_workers
from planes.role_wishes import put_role_wish
from planes.wire.errors import HeadraceError, UnusableSetting
from planes.wire.messages import Registration, Role, RoleWish, WorkerId, WorkerState
from process.logging import printable
from process.settings import EtcdSettings

_POLL_S = 0.1


class RoleRefused(HeadraceError):  # noqa: N818 - names the outcome
    """The worker cannot, or had better not, take the role."""

    code = "role_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSettings(EtcdSettings):
    """How a worker's role is changed."""

    migrate_after_s: Annotated[
        float | None,
        Parameter(
            help="Seconds after which what the worker will not do any more goes on at another one. Default: all of it "
            "ends where it is."
        ),
    ] = None
    wait_s: Annotated[float, Parameter(help="Longest wait for the change, in seconds; the wish stands anyway.")] = 60.0
    force: Annotated[bool, Parameter(help="Leave a model without a worker that decodes.", negative="")] = False

    def __post_init__(self) -> None:
        EtcdSettings.__post_init__(self)
        for name in ("migrate_after_s", "wait_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1e6:
                raise UnusableSetting(name, value, "it must be 0 to 1000000 seconds")


async def change_role(worker: WorkerId, role: Role | None, settings: RoleSettings) -> tuple[bool, str]:
    """Ask the worker, and wait for its answer. role: None leaves it as it is, for `--autorole` to change.

    Returns:  whether it has the role now, and a sentence.  Raises:  RoleRefused; ControlPlaneUnavailable.
    """
    etcd, namespace = Etcd(settings.etcd, security=settings.etcd_security), settings.namespace
    workers = await get_workers(etcd, namespace)
    before = checked(workers, worker, role, is_forced=settings.force)
    wanted = role or before.becoming or before.role
    wish = RoleWish(before.epoch, wanted, settings.migrate_after_s, is_pin=role is not None)
    await put_role_wish(etcd, namespace, worker, wish)

    async def look() -> tuple[bool, str]:
        now = (await get_workers(etcd, namespace)).get(worker)
        return progress(before, now, wanted) if role is not None else given_back(before, now)

    return await until_changed(look, settings.wait_s, poll_s=_POLL_S)


async def until_changed(
    look: Callable[[], Awaitable[tuple[bool, str]]], wait_s: float, *, poll_s: float
) -> tuple[bool, str]:
    """What `look` tells when it is so, or at the end.  Raises:  ControlPlaneUnavailable, if the last look does."""
    deadline = time.monotonic() + wait_s
    while True:
        is_over = time.monotonic() >= deadline
        try:
            is_changed, told = await look()
        except ControlPlaneUnavailable:  # the wish stands
            if is_over:
                raise
        else:
            if is_changed or is_over:
                return is_changed, told
        await asyncio.sleep(poll_s)


def checked(
    workers: Mapping[WorkerId, Registration], worker: WorkerId, role: Role | None, *, is_forced: bool = False
) -> Registration:
    """The worker as it is registered.  Raises:  RoleRefused if it cannot take the role, or nobody else would decode."""
    own = workers.get(worker)
    if own is None:
        known = ", ".join(printable(name) for name in sorted(workers)[:20]) or "none"
        raise RoleRefused(f"no worker {worker[:64]!r} is registered; there are: {known}")
    if own.state is not WorkerState.READY:
        raise RoleRefused(f"worker {worker} is {own.state}: it stops")
    if role is None:
        return own
    if role not in (*own.roles, own.role):
        raise RoleRefused(
            f"worker {worker} cannot become {role}: its {own.engine} engine was started as {own.role} and can be "
            f"nothing else; start it with --role both and a --handover"
        )
    others = [each for name, each in workers.items() if name != worker and each.model == own.model]
    is_last = not any(each.takes_answers and each.state is WorkerState.READY for each in others)
    if not role.can_decode and is_last and not is_forced:
        raise RoleRefused(f"no other worker of model {own.model!r} decodes, so nobody would answer; --force does it")
    return own


def progress(before: Registration, now: Registration | None, role: Role) -> tuple[bool, str]:
    """Whether the worker has the role, and a sentence.  Raises:  RoleRefused if it never will by this wish."""
    worker = before.worker
    if now is None:
        raise RoleRefused(f"worker {worker} has left before it became {role}")
    if now.epoch != before.epoch:
        raise RoleRefused(f"worker {worker} was started anew before it became {role}; it is {now.role}: ask it again")
    if now.becoming is role:
        return False, f"{worker} is {now.role} and becomes {role} when it has ended what it will not do any more"
    if now.role is role and now.becoming is None:
        was = "" if before.role is role else f"; it was {before.role}"
        return True, f"{worker} is {role}{was}"
    return False, f"{worker} is {now.role} and has not answered the wish to become {role}"


def given_back(before: Registration, now: Registration | None) -> tuple[bool, str]:
    """Whether `--autorole` may change the worker, and a sentence.  Raises:  RoleRefused if it has gone."""
    worker = before.worker
    if now is None or now.epoch != before.epoch:
        raise RoleRefused(f"worker {worker} has left, or was started anew; then nobody had pinned it")
    if now.is_pinned:
        return False, f"{worker} has not answered the wish to let --autorole change its role"
    return True, f"{worker} is {now.role}, and --autorole may change that"
