"""The keys that etcd has, as a gateway knows them: heard at once, and kept in memory while etcd is away."""

from collections.abc import Mapping

import structlog

from app.keys.record import decoded, tenants_of
from app.keys.tenant import Tenant

_log = structlog.get_logger()


class StoredKeys:
    """Tenants by sha256 of their key; `take` and `listed` are what `Entries.watch` calls.

    What cannot be read lets nobody in, and is said.
    """

    def __init__(self) -> None:
        self._digests: dict[str, list[bytes]] = {}
        self._tenants: dict[bytes, Tenant] = {}
        self.is_known = False
        """Whether etcd has ever said which there are."""

    @property
    def tenants(self) -> Mapping[bytes, Tenant]:
        return self._tenants

    def __len__(self) -> int:
        return len(self._digests)

    def listed(self) -> None:
        if not self.is_known:
            _log.info("keys.known", keys=len(self))
        self.is_known = True

    def take(self, name: str, value: bytes | None) -> None:
        """A key is new, has changed, or is gone."""
        for digest in self._digests.pop(name, ()):
            self._tenants.pop(digest, None)
        if value is None:
            if self.is_known:
                _log.info("key.revoked", key=name)
            return
        try:
            tenants = tenants_of(name, decoded(value))
        except ValueError as exc:
            _log.warning("key.malformed", key=name, reason=str(exc))
            return
        self._digests[name] = list(tenants)
        self._tenants.update(tenants)
