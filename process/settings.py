"""Reading a process's settings: one frozen dataclass gives flags, `HEADRACE_*` variables, defaults and help (ADR 7)."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from planes.control_client import EtcdKeys
from planes.events_client import NatsKeys
from planes.security.planes import EtcdSecurity, NatsSecurity, PlaneSecurity, StreamSecurity
from planes.security.tls import TlsFiles
from planes.streams.greeting import StreamKeys
from planes.wire.errors import HeadraceError, UnusableSetting
from planes.wire.names import check_namespace
from planes.wire.urls import parse_etcd, parse_nats, redacted
from process.environment import Environment, variable


def check_setting(name: str, value: Any, check: Callable[[Any], object]) -> None:
    """Raises:  UnusableSetting where `check` raises ValueError."""
    try:
        check(value)
    except ValueError as exc:
        raise UnusableSetting(name, value, str(exc)) from exc


def check_pair(settings: object, first: str, second: str) -> None:
    """Raises:  UnusableSetting if one is given without the other."""
    for name, other in ((first, second), (second, first)):
        value = getattr(settings, name)
        if value is not None and getattr(settings, other) is None:
            raise UnusableSetting(name, str(value), f"it needs --{other.replace('_', '-')}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSettings:
    """What every command has that talks to etcd."""

    etcd: Annotated[str, Parameter(help="URL of the etcd cluster, http[s]://[user:password@]host:port[,...].")] = (
        "http://127.0.0.1:2379"
    )
    namespace: Annotated[str, Parameter(help="Separates fleets that share etcd and NATS.")] = "default"
    plane_ca: Annotated[
        Path | None,
        Parameter(
            help="PEM file: whose signatures count at etcd, NATS and on workers' streams. Default: the system's CAs."
        ),
    ] = None
    plane_cert: Annotated[
        Path | None,
        Parameter(
            help="PEM file: the certificate that this process shows etcd, NATS and on workers' streams. With a CA and "
            "a key, streams have mutual TLS."
        ),
    ] = None
    plane_key: Annotated[Path | None, Parameter(help="PEM file: its key. All are read anew when they change.")] = None
    etcd_ca: Annotated[Path | None, Parameter(help="For etcd, in place of --plane-ca.")] = None
    etcd_cert: Annotated[Path | None, Parameter(help="For etcd, in place of --plane-cert.")] = None
    etcd_key: Annotated[Path | None, Parameter(help="For etcd, in place of --plane-key.")] = None
    etcd_user: Annotated[str | None, Parameter(help="User of etcd; needs --etcd-password-file.")] = None
    etcd_password_file: Annotated[Path | None, Parameter(help="File with the password of --etcd-user.")] = None

    def __post_init__(self) -> None:
        check_setting("etcd", self.etcd, parse_etcd)
        check_setting("namespace", self.namespace, check_namespace)
        check_pair(self, "plane_cert", "plane_key")
        check_pair(self, "etcd_cert", "etcd_key")
        check_pair(self, "etcd_user", "etcd_password_file")
        address = parse_etcd(self.etcd)
        if address.login is not None and self.etcd_user is not None:
            raise UnusableSetting("etcd_user", self.etcd_user, "--etcd names a user, too; one is enough")
        if not address.is_tls and (name := _first(self, "etcd_ca", "etcd_cert")):
            allowed = f"it needs an --etcd that begins with https:// (it is {redacted(self.etcd)})"
            raise UnusableSetting(name, str(getattr(self, name)), allowed)
        check_setting("etcd", self.etcd, lambda _: EtcdKeys(address, self.etcd_security))

    @property
    def etcd_security(self) -> EtcdSecurity:
        return EtcdSecurity(_files(self, "etcd"), self.etcd_user, self.etcd_password_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSettings(EtcdSettings):
    """What every command has that talks to etcd and NATS."""

    nats: Annotated[
        str,
        Parameter(help="URL of the NATS cluster, nats://[user:password@ or token@]host:port[,...], or tls://."),
    ] = "nats://127.0.0.1:4222"
    nats_ca: Annotated[Path | None, Parameter(help="For NATS, in place of --plane-ca.")] = None
    nats_cert: Annotated[Path | None, Parameter(help="For NATS, in place of --plane-cert.")] = None
    nats_key: Annotated[Path | None, Parameter(help="For NATS, in place of --plane-key.")] = None
    nats_user: Annotated[str | None, Parameter(help="User of NATS; needs --nats-password-file.")] = None
    nats_password_file: Annotated[Path | None, Parameter(help="File with the password of --nats-user.")] = None
    nats_token_file: Annotated[Path | None, Parameter(help="File with NATS's token.")] = None
    nats_nkey_file: Annotated[Path | None, Parameter(help="File with the seed of an nkey, SU… (extra: nkeys).")] = None
    nats_credentials_file: Annotated[
        Path | None, Parameter(help="File of NATS credentials, a JWT and a seed (extra: nkeys).")
    ] = None
    stream_token_file: Annotated[
        Path | None,
        Parameter(help="File with a secret that gateways and workers prove to each other that they know it."),
    ] = None

    def __post_init__(self) -> None:
        EtcdSettings.__post_init__(self)  # a class with slots is made twice, and super() knows the first one
        check_setting("nats", self.nats, parse_nats)
        check_pair(self, "nats_cert", "nats_key")
        check_pair(self, "nats_user", "nats_password_file")
        address = parse_nats(self.nats)
        ways = ("nats_user", "nats_token_file", "nats_nkey_file", "nats_credentials_file")
        named = [way for way in ways if getattr(self, way) is not None]
        if named and (len(named) > 1 or address.login is not None or address.token is not None):
            other = f"--{named[1].replace('_', '-')}" if len(named) > 1 else "--nats"
            raise UnusableSetting(named[0], str(getattr(self, named[0])), f"{other} names a secret, too; one is enough")
        if not address.is_tls and (name := _first(self, "nats_ca", "nats_cert")):
            allowed = f"it needs a --nats that begins with tls:// (it is {redacted(self.nats)})"
            raise UnusableSetting(name, str(getattr(self, name)), allowed)
        check_setting("nats", self.nats, lambda _: NatsKeys(address, self.nats_security))
        name = "plane_cert" if self.stream_token_file is None else "stream_token_file"
        check_setting(name, str(getattr(self, name)), lambda _: StreamKeys(self.stream_security))

    @property
    def stream_security(self) -> StreamSecurity:
        return StreamSecurity(_files(self, "plane"), self.stream_token_file)

    @property
    def nats_security(self) -> NatsSecurity:
        return NatsSecurity(
            _files(self, "nats"),
            self.nats_user,
            self.nats_password_file,
            self.nats_token_file,
            self.nats_nkey_file,
            self.nats_credentials_file,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSettings(PlaneSettings):
    """What gateways and workers have in common: the planes they meet over, and their log."""

    insecure: Annotated[
        bool,
        Parameter(
            help="Listen on an address that others reach, although there is no key or the planes are open.", negative=""
        ),
    ] = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Parameter(help="Least level to log.")] = "info"
    log_json: Annotated[bool, Parameter(help="Log JSON lines.")] = False

    @property
    def security(self) -> PlaneSecurity:
        return PlaneSecurity(self.etcd_security, self.nats_security, self.stream_security)


def _files(settings: EtcdSettings, plane: str) -> TlsFiles:
    """A plane's own files, and all planes' where it has none."""
    own = [getattr(settings, f"{plane}_{each}") for each in ("ca", "cert", "key")]
    all_planes = [settings.plane_ca, settings.plane_cert, settings.plane_key]
    ca = own[0] or all_planes[0]
    return TlsFiles(ca, *(own[1:] if own[1] else all_planes[1:]))


def _first(settings: EtcdSettings, *names: str) -> str | None:
    return next((name for name in names if getattr(settings, name) is not None), None)


def command_line(name: str, summary: str) -> cyclopts.App:
    """A command line whose flags may also come from `HEADRACE_<FLAG>`, whatever the command."""
    return cyclopts.App(name=name, help=summary, config=Environment(), version_flags=[])


def run(app: cyclopts.App, arguments: list[str] | None = None) -> int:
    """Run the command that the arguments (else `sys.argv`) name.

    Returns:  the exit status; 2, after one line, if it could not start.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _refuse_visible_secrets(arguments)
        status = app(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as exc:
        return refused(redacted(str(exc)))  # it repeats what was typed
    except HeadraceError as exc:
        return refused(str(exc))
    return status if isinstance(status, int) else 0


class VisibleSecret(HeadraceError):  # noqa: N818 - names what is wrong
    """A secret on a command line, which every user of the machine can read."""

    code = "visible_secret"

    def __init__(self, flag: str) -> None:
        by_file = "--etcd-password-file" if flag == "--etcd" else "--nats-password-file or --nats-token-file"
        super().__init__(
            f"{flag} has a secret in it, which everybody on this machine would see in ps: give the url as "
            f"{variable(flag.strip('-'))}, or the secret in a file ({by_file})"
        )


def _refuse_visible_secrets(arguments: list[str]) -> None:
    """Raises:  VisibleSecret."""
    for flag, value in itertools.pairwise([*(part for each in arguments for part in _flag_and_value(each))]):
        if flag in ("--etcd", "--nats") and redacted(value) != value:
            raise VisibleSecret(flag)


def _flag_and_value(argument: str) -> tuple[str, ...]:
    flag, equals, value = argument.partition("=")
    return (flag, value) if equals and flag.startswith("--") else (argument,)


def refused(reason: str) -> int:
    print(f"headrace: {' '.join(reason.split())}", file=sys.stderr)  # noqa: T201 - the command line's own answer
    return 2
