"""TLS contexts, all of them.

| who                  | shows          | believes         | asks for a host's name                        |
|----------------------|----------------|------------------|-----------------------------------------------|
| client of etcd, NATS | `cert`, if any | `ca` or system's | yes                                           |
| gateway to a worker  | `cert`         | `ca`             | no: the CA is the fleet's own, addresses vary |
| worker to gateways   | `cert`         | `ca`, required   | no                                            |
| gateway to clients   | `cert`         | nobody           | no                                            |
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from planes.security.files import Reloaded, UnusableFile, read_bytes

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files.

    ca: certificates of those whose signatures are believed; None: the system's.  cert, key: what this process shows, or
    None for both.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a certificate and its key are given together")

    @property
    def is_mutual(self) -> bool:
        """Whether both sides can be asked for a certificate of one CA."""
        return self.ca is not None and self.cert is not None


def client_tls(files: TlsFiles) -> Reloaded[ssl.SSLContext]:
    """For connecting to servers that are known by name.  Raises:  UnusableFile."""
    return _reloaded(files, lambda: _context(ssl.PROTOCOL_TLS_CLIENT, files))


def gateway_tls(files: TlsFiles) -> Reloaded[ssl.SSLContext]:
    """For a gateway's end of a stream.  Raises:  UnusableFile."""

    def make() -> ssl.SSLContext:
        context = _context(ssl.PROTOCOL_TLS_CLIENT, files)
        context.check_hostname = False  # verify_mode stays CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context

    return _reloaded(files, make)


def worker_tls(files: TlsFiles) -> Reloaded[ssl.SSLContext]:
    """For a worker's end of a stream: who shows no certificate of the fleet's CA gets no further.

    Raises:  UnusableFile.
    """

    def make() -> ssl.SSLContext:
        context = _context(ssl.PROTOCOL_TLS_SERVER, files)
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # a resumed session would not be asked for its certificate
        return context

    return _reloaded(files, make)


def http_tls(cert: Path, key: Path) -> ssl.SSLContext:
    """For clients of HTTP. Each handshake takes what the files hold by then.  Raises:  UnusableFile."""
    files = TlsFiles(None, cert, key)
    current = _reloaded(files, lambda: _context(ssl.PROTOCOL_TLS_SERVER, files))
    context = _context(ssl.PROTOCOL_TLS_SERVER, files)

    def take_current(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = current()

    context.sni_callback = take_current  # OpenSSL asks at every handshake, whether a name was sent or not
    return context


def grpc_files(files: TlsFiles) -> Reloaded[tuple[bytes | None, bytes | None, bytes | None]]:
    """CA, key and certificate as gRPC takes them; known to fit.  Raises:  UnusableFile."""

    def make() -> tuple[bytes | None, bytes | None, bytes | None]:
        _context(ssl.PROTOCOL_TLS_CLIENT, files)
        ca, key, cert = (None if path is None else read_bytes(path) for path in (files.ca, files.key, files.cert))
        return ca, key, cert

    return _reloaded(files, make)


def _reloaded(files: TlsFiles, make: Callable[[], _Made]) -> Reloaded[_Made]:
    return Reloaded((files.ca, files.cert, files.key), make)


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if files.ca is not None:
        try:
            context.load_verify_locations(files.ca)
        except (OSError, ValueError) as exc:
            raise UnusableFile(files.ca, f"holds no certificate of a CA: {_reason(exc)}") from exc
    elif protocol == ssl.PROTOCOL_TLS_CLIENT:
        context.load_default_certs()
    if files.cert is not None and files.key is not None:
        try:
            context.load_cert_chain(files.cert, files.key, password=_no_password)
        except (OSError, ValueError) as exc:
            raise UnusableFile(files.cert, f"is no certificate for the key {files.key}: {_reason(exc)}") from exc
    return context


def _no_password() -> str:
    """OpenSSL would ask at the terminal."""
    raise ValueError("the key is encrypted; give one that is not, readable by this user alone")


def _reason(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        return (exc.reason or "no PEM").lower().replace("_", " ")
    return exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)
