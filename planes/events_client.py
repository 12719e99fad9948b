"""One client of NATS: nats-py's, with certificates and secrets as the files say when it connects, again and again."""

import base64
import importlib
import importlib.util
import re
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planes.security.files import Reloaded, UnusableFile, read_secret
from planes.security.planes import NatsSecurity
from planes.security.tls import client_tls
from planes.wire.urls import Login, NatsAddress


@contextmanager
def _without(package: str) -> Iterator[None]:
    """What is imported here does not find `package`, unless it has been imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # so is the import system told that there is none
    try:
        yield
    finally:
        del sys.modules[package]


with _without("aiohttp"):  # for NATS over WebSockets, which no address here asks for: 8 MB, and 70 ms of a start
    import nats.errors
    from nats.aio.client import Client as NatsClient

_JWT = re.compile(r"-----BEGIN NATS USER JWT-----\s+(\S+)\s")
_SEED = re.compile(r"-----BEGIN USER NKEY SEED-----\s+(\S+)\s")


class NatsKeys:
    """What this process shows NATS, as the files say by now.

    Raises:  UnusableFile; ValueError for an nkey or credentials without the package `nkeys`.
    """

    def __init__(self, address: NatsAddress, security: NatsSecurity) -> None:
        self.needs_tls = address.is_tls
        self._tls = client_tls(security.tls)
        self._address, self._user = address, security.user
        self._password = _secret(security.password_file, lambda text, _: text)
        self._token = _secret(security.token_file, lambda text, _: text)
        self._seed = _secret(security.nkey_file, lambda text, file: _checked_seed(text.strip(), file))
        self._credentials = _secret(security.credentials_file, _jwt_and_seed)

    @property
    def tls(self) -> ssl.SSLContext:
        return self._tls()

    @property
    def login(self) -> Login | None:
        if self._user is None or self._password is None:
            return self._address.login
        return Login(self._user, self._password())

    @property
    def token(self) -> str | None:
        return self._address.token if self._token is None else str(self._token())

    @property
    def jwt(self) -> bytes | None:
        """Of the user that a file of credentials makes us."""
        return None if self._credentials is None else self._credentials()[0].encode()

    @property
    def seed(self) -> str | None:
        """What signs: the nkey's, or the one in a file of credentials."""
        if self._credentials is not None:
            return str(self._credentials()[1])
        return None if self._seed is None else str(self._seed())


class Client(NatsClient):
    """nats-py's client; what it sends about itself and the certificates are the keys' of the moment."""

    def __init__(self, keys: NatsKeys) -> None:
        super().__init__()
        self._keys = keys

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """Asked for at every connection."""
        return self._keys.tls

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Hear what the server is.  Raises:  nats.errors.Error: nats-py would go on without TLS, password and all."""
        if initial_connection and self._keys.needs_tls and not info.get("tls_required"):
            raise nats.errors.Error("the url begins with tls:// and the server does not ask for TLS")
        await super()._process_info(info, initial_connection=initial_connection)

    async def _process_connect_init(self) -> None:
        """Greet the server that has just been connected to."""
        try:
            await super()._process_connect_init()
        except OSError:  # nats-py would wait forever for the end of a connection whose handshake of TLS has failed
            if self._transport is not None:
                self._transport.close()  # type: ignore[no-untyped-call]
                self._transport = None
            raise

    def _connect_command(self) -> bytes:
        """What is sent first on every connection."""
        login, seed, jwt = self._keys.login, self._keys.seed, self._keys.jwt
        self.options["user"] = None if login is None else login.user
        self.options["password"] = None if login is None else login.password
        self.options["token"] = self._keys.token
        self._public_nkey = None if seed is None or jwt is not None else _public(seed)
        self._signature_cb = None if seed is None else lambda nonce: _signed(seed, nonce)
        self._user_jwt_cb = None if jwt is None else lambda: jwt
        self._auth_configured = True  # a server that wants no secret ignores it
        return super()._connect_command()


def _secret(file: Path | None, read: Callable[[str, Path], Any]) -> Reloaded[Any] | None:
    return None if file is None else Reloaded([file], lambda: read(read_secret(file), file))


def _checked_seed(seed: str, file: Path) -> str:
    if importlib.util.find_spec("nkeys") is None:
        raise ValueError("an nkey or a file of credentials needs the package nkeys: pip install 'headrace[nkeys]'")
    try:
        _public(seed)
    except Exception as exc:  # noqa: BLE001 - nkeys raises this and that, and some of it shows the seed
        raise UnusableFile(file, f"holds no seed of an nkey ({type(exc).__name__}); one begins with SU") from None
    return seed


def _jwt_and_seed(text: str, file: Path) -> tuple[str, str]:
    jwt, seed = _JWT.search(text), _SEED.search(text)
    if jwt is None or seed is None:
        raise UnusableFile(file, "is no file of NATS credentials: it must have a user's JWT and an nkey's seed")
    return jwt[1], _checked_seed(seed[1], file)


def _public(seed: str) -> str:
    return str(_key_pair(seed).public_key.decode())


def _signed(seed: str, nonce: str) -> bytes:
    return base64.b64encode(_key_pair(seed).sign(nonce.encode()))


def _key_pair(seed: str) -> Any:
    nkeys = importlib.import_module("nkeys")  # an extra, for those who have nkeys
    return nkeys.from_seed(bytearray(seed.encode()))
