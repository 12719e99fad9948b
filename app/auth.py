"""Who is asking, and how many sequences of theirs are under way.

Keys come from a file (`app/keys/file.py`), from etcd (`app/keys/record.py`), or from both. Without either everybody may
ask. A key from etcd works as long as the gateway remembers it, whether etcd is there or not.
"""

import ipaddress
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from app.keys.file import load_keys
from app.keys.stored import StoredKeys
from app.keys.tenant import ANYBODY, Tenant, digest_of
from planes.wire.errors import InvalidRequest, Rejected


class Unauthenticated(InvalidRequest):
    """No key, or one that is not ours."""

    code = "invalid_api_key"


class AdminOnly(InvalidRequest):
    """What is everybody's is told to keys that may see it."""

    code = "admin_only"

    def __init__(self) -> None:
        super().__init__("This needs a key that was made with --admin: it tells what is everybody's.")


class KeysUnknown(Rejected):
    """Keys are in etcd, which could not be asked since this gateway was started."""

    code = "keys_unknown"

    def __init__(self) -> None:
        super().__init__(
            "This gateway has just been started and does not know the API keys yet; try again in a moment.",
            retry_after_s=1.0,
        )


class TooManyConcurrent(Rejected):
    """The tenant has so many sequences under way that its key does not allow this request's too."""

    code = "concurrency_limit"

    def __init__(self, tenant: str, running: int, n: int, limit: int) -> None:
        super().__init__(
            f"{running} sequences of '{tenant}' are under way, this request is for {n}, and the limit is {limit}; "
            "send it when some have ended.",
            retry_after_s=1.0,
        )


class TooManyChoices(InvalidRequest):
    """A request for more sequences than the tenant's key ever allows at once."""

    code = "too_many_choices"

    def __init__(self, tenant: str, n: int, limit: int) -> None:
        super().__init__(
            f"'n' is {n} and the key of '{tenant}' allows {limit} sequences at once; ask for fewer choices.", param="n"
        )


class ApiKeys:
    """The keys of one gateway, and the sequences that each of them has under way."""

    def __init__(
        self, path: Path | None = None, *, stored: StoredKeys | None = None, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """Args:  path: of the file; None: there is none.  stored: those in etcd; None: they are not asked for.

        Raises:  KeyFileError.
        """
        self.path = path
        self.stored = stored
        self._wall_clock = wall_clock
        self._tenants = {} if path is None else load_keys(path)
        self._running: dict[str, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return self.path is None and self.stored is None

    def reload(self) -> None:
        """Read the file again; requests under way stay counted.  Raises:  KeyFileError: the old keys stay valid."""
        if self.path is not None:
            self._tenants = load_keys(self.path)

    def authenticate(self, headers: Mapping[str, str]) -> Tenant:
        """Who sent these headers (lower-case names).  Raises:  Unauthenticated, KeysUnknown."""
        if self.is_open:
            return ANYBODY
        key = _key_in(headers)
        if not key:
            raise Unauthenticated(
                "No API key was given; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'."
            )
        # Looked up by digest: how long that takes tells nothing about a key, as its sender cannot choose the digest.
        digest = digest_of(key)
        tenant = self._tenants.get(digest)
        if tenant is None and self.stored is not None:
            tenant = self.stored.tenants.get(digest)
            if tenant is None and not self.stored.is_known:
                raise KeysUnknown
        if tenant is None:
            raise Unauthenticated("The API key is not one of this server's.")
        if tenant.expires_at is not None and self._wall_clock() >= tenant.expires_at:
            raise Unauthenticated("The API key has expired; ask whoever runs this server for another.")
        return tenant

    def authenticate_admin(self, headers: Mapping[str, str]) -> Tenant:
        """As `authenticate`, for what is everybody's.  Raises:  AdminOnly too."""
        tenant = self.authenticate(headers)
        if not tenant.is_admin:
            raise AdminOnly
        return tenant

    def admitted(self, tenant: Tenant) -> "TenantSlots":
        """Count a request as under way for as long as a `with` block runs."""
        return TenantSlots(tenant, self._running)

    def num_running(self, tenant: Tenant) -> int:
        return self._running.get(tenant.account, 0)


class TenantSlots:
    """The sequences of one request under way. `running`: those of each account; changed here."""

    __slots__ = ("_num", "_running", "_tenant")

    def __init__(self, tenant: Tenant, running: dict[str, int]) -> None:
        self._tenant = tenant
        self._running = running
        self._num = 0

    def __enter__(self) -> Self:
        """One sequence, as long as no more is known.  Raises:  TooManyConcurrent."""
        self.widen(1)
        return self

    def widen(self, n: int) -> None:
        """The request is for `n` sequences.  Raises:  TooManyConcurrent, TooManyChoices."""
        account, limit = self._tenant.account, self._tenant.max_concurrent
        others = self._running.get(account, 0) - self._num
        if limit is not None and n > limit:
            raise TooManyChoices(self._tenant.name, n, limit)
        if limit is not None and others + n > limit:
            raise TooManyConcurrent(self._tenant.name, others, n, limit)
        self._running[account] = others + n
        self._num = n

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """None of them is under way any more. Said again, it changes nothing."""
        if not self._num:
            return
        left = self._running[self._tenant.account] - self._num
        if left:
            self._running[self._tenant.account] = left
        else:
            del self._running[self._tenant.account]
        self._num = 0


def _key_in(headers: Mapping[str, str]) -> str:
    """OpenAI's clients send a bearer token, Anthropic's a header of its own; "" where there is neither."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip()


def is_open_to_others(host: str, key_file: Path | None, *, has_stored_keys: bool = False) -> bool:
    """Whether a gateway that listens on `host` serves whoever reaches this machine, no key needed."""
    if key_file is not None or has_stored_keys or host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # a name may be anything
