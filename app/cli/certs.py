"""`headrace certs`: a CA, certificates and a token of its own for trying a secured fleet out.

| file            | whose                                      | may be shown                  |
|-----------------|--------------------------------------------|-------------------------------|
| ca.pem, ca.key  | the CA's                                   | ca.pem to everybody           |
| server.pem/.key | the gateway's HTTPS, etcd's and NATS's     | by a server, under its names  |
| plane.pem/.key  | gateways, workers and commands             | by both ends of a stream      |
| stream-token    | gateways and workers                       | never                         |

A second time the CA and the token stay and the certificates are new: so one renews them, or adds a name. Running
processes take the new ones by themselves.
"""

import os
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from planes.wire.errors import HeadraceError, UnusableSetting


class CertsNotMade(HeadraceError):  # noqa: N818 - names the outcome
    """The certificates could not be made."""

    code = "certs_not_made"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertsSettings:
    """For whom, and for how long."""

    host: Annotated[
        tuple[str, ...],
        Parameter(
            help="Name or address under which the servers are reached; may be given several times.",
            negative="",
            show_env_var=False,
        ),
    ] = ("localhost", "127.0.0.1", "::1")
    days: Annotated[int, Parameter(help="Days that the certificates are valid.", show_env_var=False)] = 90

    def __post_init__(self) -> None:
        if not self.host or not all(host and host.isascii() for host in self.host):
            raise UnusableSetting("host", ", ".join(self.host), "a host is a name in ASCII or an address")
        if not 1 <= self.days <= 3650:
            raise UnusableSetting("days", self.days, "it must be 1 to 3650")


@dataclass(frozen=True, slots=True)
class CertSet:
    """Where everything is."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def server(self) -> tuple[Path, Path]:
        return self.folder / "server.pem", self.folder / "server.key"

    @property
    def plane(self) -> tuple[Path, Path]:
        return self.folder / "plane.pem", self.folder / "plane.key"

    @property
    def token(self) -> Path:
        return self.folder / "stream-token"

    @property
    def flags(self) -> dict[str, str]:
        """Settings of every process of a fleet."""
        cert, key = self.plane
        named = {"plane_ca": self.ca, "plane_cert": cert, "plane_key": key, "stream_token_file": self.token}
        return {name: str(path.absolute()) for name, path in named.items()}


def make_certs(folder: Path, settings: CertsSettings) -> CertSet:
    """Make the set, or renew its certificates.  Raises:  CertsNotMade."""
    try:
        from app.cli.authority import Authority, UnusableAuthority  # noqa: PLC0415 - needs what a gateway does not
    except ImportError as exc:
        raise CertsNotMade("headrace certs needs the package cryptography: pip install 'headrace[local]'") from exc
    made = CertSet(folder)
    valid = timedelta(days=settings.days)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if made.ca.exists() or made.ca_key.exists():
            authority = Authority.read(made.ca.read_bytes(), made.ca_key.read_bytes())
        else:
            authority = Authority.new(f"Headrace fleet {secrets.token_hex(4)}")
            _write(made.ca_key, authority.key_pem, is_secret=True)
            _write(made.ca, authority.pem)
        for files, name, is_client in ((made.server, settings.host[0], False), (made.plane, "headrace", True)):
            issued = authority.issue(name, settings.host, valid, is_client=is_client)
            for file, pem in zip(files, issued, strict=True):  # who looks in between finds no pair, and waits
                _write(file, pem, is_secret=file.suffix == ".key")
        if not made.token.exists():
            _write(made.token, f"{secrets.token_hex(32)}\n".encode(), is_secret=True)
    except OSError as exc:
        raise CertsNotMade(f"{exc.filename or folder}: {exc.strerror}") from exc
    except UnusableAuthority as exc:
        raise CertsNotMade(f"{made.ca} and {made.ca_key} are no CA: {exc}; another folder gets a new one") from exc
    return made


def told(made: CertSet) -> str:
    """What to do with it, for the terminal."""
    cert, key = (path.absolute() for path in made.server)
    flags = " ".join(f"--{name.replace('_', '-')} {path}" for name, path in made.flags.items())
    return (
        f"made in {made.folder.absolute()}\n\n"
        f"every process:      {flags}\n"
        f"gateway, for HTTPS: --tls-cert {cert} --tls-key {key}\n"
        f"etcd:               --cert-file {cert} --key-file {key} --trusted-ca-file {made.ca.absolute()} "
        "--client-cert-auth\n"
        f"NATS:               --tlscert {cert} --tlskey {key} --tlscacert {made.ca.absolute()} --tlsverify\n"
        f"clients:            curl --cacert {made.ca.absolute()}\n\n"
        f"Who has {made.ca_key.absolute()} can make members of this fleet: keep it away from the machines."
    )


def _write(path: Path, content: bytes, *, is_secret: bool = False) -> None:
    """In one step, so that nobody reads half a file."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(
        os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if is_secret else 0o644), "wb"
    ) as file:
        file.write(content)
    unfinished.replace(path)
