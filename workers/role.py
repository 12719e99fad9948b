"""The role of a running worker, and how it becomes another one.

What a role does is two things: computing prompts for others, and decoding. Becoming another role begins with what both
have in common and ends with what the new one adds:

| wish                                         | registered at once      | then                                       |
|----------------------------------------------|-------------------------|--------------------------------------------|
| what it is                                   | role                    |                                            |
| gives nothing up (both)                      | both                    |                                            |
| gives something up                           | role, becoming another  | once nothing of that is left: the new role |
| another one meanwhile                        | as above, from its role | the drain begins anew                      |
| of another epoch, or not what its engine can | (nothing changes)       |                                            |

A role that was wished for by hand is registered as pinned, and `--autorole` leaves it alone.

While it drains nothing is routed here but what both roles do. What is sent here all the same is taken until etcd has
been told and a moment has passed, for gateways to hear of it; then it is refused, and served elsewhere
(`role_changed`), so that what there is to end only becomes less. While etcd is away nothing is given up. KV caches that
wait to be fetched are the engine's, whatever the role: they stay under their leases.
"""

import asyncio
import contextlib
from typing import Protocol

import msgspec
import structlog

from planes.wire.messages import Registration, Role, RoleWish, WorkerId, WorkerState

_log = structlog.get_logger()

_NEWS_S = 1.0
"""From etcd's having been told until gateways have heard, and what they had sent before has come."""


class RoleServer(Protocol):
    """What is needed of `workers.server.WorkerServer`."""

    def change_role(self, role: Role | None) -> None: ...
    def num_beyond(self, role: Role) -> int: ...
    def move_beyond(self, role: Role) -> None: ...
    async def until_within(self, role: Role) -> None: ...


class RoleRegistrar(Protocol):
    """What is needed of `planes.control.Registrar`."""

    def update(self, registration: Registration) -> None: ...
    async def until_told(self) -> None: ...


class QueueHand(Protocol):
    """What is needed of `workers.prefill_queue.Puller`."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class RoleKeeper:
    """Follows the wishes for one worker's role.

    puller: where it takes prompts from the queue.  news_s: see `_NEWS_S`.
    """

    def __init__(
        self,
        registration: Registration,
        server: RoleServer,
        registrar: RoleRegistrar,
        puller: QueueHand | None = None,
        *,
        news_s: float = _NEWS_S,
    ) -> None:
        self.registration = registration
        """As it stands."""
        self._server = server
        self._registrar = registrar
        self._puller = puller
        self._news_s = news_s
        self._wish: RoleWish | None = None
        self._has_come = asyncio.Event()
        if puller is not None and not registration.takes_prompts:
            puller.pause()

    def wished(self, _: WorkerId, wish: RoleWish | None) -> None:
        """A wish stands in etcd. None: it has been taken away, and what it led to remains."""
        if wish is None or wish == self._wish:
            return
        own = self.registration
        refusal = ""
        if wish.epoch != own.epoch:
            refusal = f"it is meant for the life of epoch {wish.epoch}, and this one's is {own.epoch}"
        elif wish.role not in (*own.roles, own.role):
            refusal = f"this worker's engine was started to be {own.role} and nothing else"
        if refusal:
            _log.warning("role.refused", worker=own.worker, role=wish.role, reason=refusal)
            return
        self._wish = wish
        self.registration = msgspec.structs.replace(own, is_pinned=wish.is_pin)
        self._has_come.set()

    async def run(self) -> None:
        """Follow each wish, until the next one comes, or cancelled."""
        async with asyncio.TaskGroup() as group:
            following: asyncio.Task[None] | None = None
            while True:
                await self._has_come.wait()
                self._has_come.clear()
                if following is not None:
                    following.cancel()
                if self._wish is not None:
                    following = group.create_task(self._follow(self._wish))

    def loaded(self, adapters: dict[int, str]) -> None:
        """Register which adapters there are, and why others are not: `Registration.adapters`."""
        self.registration = msgspec.structs.replace(self.registration, adapters=adapters)
        self._registrar.update(self.registration)

    def drain(self) -> None:
        """Register that the worker stops. Whatever its role becomes, it never comes back."""
        self.registration = msgspec.structs.replace(self.registration, state=WorkerState.DRAINING)
        self._registrar.update(self.registration)

    async def _follow(self, wish: RoleWish) -> None:
        own, server = self.registration, self._server
        server.change_role(own.role)
        if _gives_up(own.role, wish.role):
            self._tell(own.role, becoming=wish.role)
            num_left = server.num_beyond(wish.role)
            _log.info("role.changing", worker=own.worker, role=own.role, becoming=wish.role, requests=num_left)
            await self._registrar.until_told()
            await asyncio.sleep(self._news_s)
            server.change_role(self.registration.takes)
            await self._drain(wish)
        server.change_role(wish.role)
        self._tell(wish.role, becoming=None)
        _log.info("role.changed", worker=own.worker, role=wish.role, before=own.role)

    async def _drain(self, wish: RoleWish) -> None:
        """Wait until what the new role does not do has ended here, or could be moved."""
        if wish.migrate_after_s is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wish.migrate_after_s):
                    await self._server.until_within(wish.role)
            self._server.move_beyond(wish.role)
        await self._server.until_within(wish.role)

    def _tell(self, role: Role, *, becoming: Role | None) -> None:
        registration = msgspec.structs.replace(self.registration, role=role, becoming=becoming)
        is_pulling = self._puller is not None and registration.takes_prompts
        self.registration = msgspec.structs.replace(registration, is_pulling=is_pulling)
        self._registrar.update(self.registration)
        if self._puller is not None:
            self._puller.resume() if is_pulling else self._puller.pause()


def _gives_up(role: Role, wanted: Role) -> bool:
    """Whether the role does something that the wanted one does not."""
    return (role.can_prefill and not wanted.can_prefill) or (role.can_decode and not wanted.can_decode)
