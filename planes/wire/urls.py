"""Where etcd and NATS are, as an operator writes it: addresses apart from credentials, which no text of ours shows."""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

_Secret = TypeVar("_Secret")

_USERINFO = re.compile(r"(://)(?:(?!,\s*\w+://).)*@", re.DOTALL)
"""From a scheme to the last @ before the next url: a password may hold what should have been encoded."""

_ETCD_FORM = "must look like http[s]://[user:password@]host:port[,host:port...], with one scheme for all"
_NATS_FORM = "must look like nats://[user:password@ or token@]host:port[,nats://host:port...], or tls://"


def redacted(text: str) -> str:
    """The text, with what stands before the @ of its urls left out."""
    return _USERINFO.sub(r"\1***@", text)


@dataclass(frozen=True, slots=True)
class Login:
    """A user and a password."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """One etcd cluster. IPv6 hosts stand in brackets."""

    endpoints: tuple[tuple[str, int], ...]
    login: Login | None = None
    is_tls: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, and reached by nobody else."""
        return all(is_loopback(host.strip("[]")) for host, _ in self.endpoints)


@dataclass(frozen=True, slots=True)
class NatsAddress:
    """One NATS cluster; `servers` are urls without credentials."""

    servers: tuple[str, ...]
    login: Login | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def is_tls(self) -> bool:
        """Whether any server must speak TLS, and so all."""
        return any(server.startswith("tls:") for server in self.servers)

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, and reached by nobody else."""
        return all(is_loopback(urlsplit(server).hostname or "") for server in self.servers)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`; of a name other than localhost nobody knows."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_etcd(url: str) -> EtcdAddress:
    """Raises:  ValueError with the url, less its secrets, and what is expected."""
    endpoints, logins = [], set()
    schemes: list[str] = []
    for part in url.split(","):
        text = part.strip()
        address = _split(text if "://" in text else f"{schemes[0] if schemes else 'http'}://{text}")
        if address is None or address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"etcd url {redacted(url)!r} {_ETCD_FORM}")
        schemes.append(address.scheme)
        if address.scheme != schemes[0]:
            raise ValueError(f"etcd url {redacted(url)!r} {_ETCD_FORM}")
        host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
        endpoints.append((host, address.port or 2379))
        if "@" in address.netloc:
            if not address.username or not address.password:
                raise ValueError(f"etcd url {redacted(url)!r} needs a user and a password before the @")
            logins.add(Login(unquote(address.username), unquote(address.password)))
    return EtcdAddress(tuple(endpoints), _only(logins, "etcd", url), schemes[0] == "https")


def parse_nats(url: str) -> NatsAddress:
    """Raises:  ValueError with the url, less its secrets, and what is expected."""
    servers, secrets = [], set()
    for part in url.split(","):
        address = _split(part.strip())
        if address is None or address.scheme not in ("nats", "tls") or not address.hostname or address.port == 0:
            raise ValueError(f"NATS url {redacted(url)!r} {_NATS_FORM}")
        servers.append(f"{address.scheme}://{address.netloc.rpartition('@')[2]}")
        if "@" in address.netloc:
            if not address.username or address.password == "":
                raise ValueError(f"NATS url {redacted(url)!r} needs a user and a password, or a token, before the @")
            user = unquote(address.username)
            secrets.add(user if address.password is None else Login(user, unquote(address.password)))
    secret = _only(secrets, "NATS", url)
    if isinstance(secret, Login):
        return NatsAddress(tuple(servers), login=secret)
    return NatsAddress(tuple(servers), token=secret)


def _split(url: str) -> SplitResult | None:
    """The url's parts; None if it is none, or has more than a host and what stands before it."""
    try:
        address = urlsplit(url)
        _ = address.port  # it is read, and refused, only now
    except ValueError:
        return None
    return None if address.path not in ("", "/") or address.query or address.fragment else address


def _only(secrets: set[_Secret], what: str, url: str) -> _Secret | None:
    if len(secrets) > 1:
        raise ValueError(f"{what} url {redacted(url)!r} has different credentials; one cluster takes one")
    return next(iter(secrets), None)
