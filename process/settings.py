"""Reading a process's settings: one frozen dataclass gives flags, `HEADRACE_*` variables, defaults and help (ADR 7)."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from planes.wire.errors import HeadraceError, UnusableSetting
from planes.wire.names import check_namespace
from planes.wire.urls import parse_etcd, parse_nats, redacted
from process.environment import Environment


def check_setting(name: str, value: Any, check: Callable[[Any], object]) -> None:
    """Raises:  UnusableSetting where `check` raises ValueError."""
    try:
        check(value)
    except ValueError as exc:
        raise UnusableSetting(name, value, str(exc)) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSettings:
    """What every command has that talks to etcd."""

    etcd: Annotated[str, Parameter(help="URL of the etcd cluster, http://[user:password@]host:port[,...].")] = (
        "http://127.0.0.1:2379"
    )
    namespace: Annotated[str, Parameter(help="Separates fleets that share etcd and NATS.")] = "default"

    def __post_init__(self) -> None:
        check_setting("etcd", self.etcd, parse_etcd)
        check_setting("namespace", self.namespace, check_namespace)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSettings(EtcdSettings):
    """What every command has that talks to etcd and NATS."""

    nats: Annotated[str, Parameter(help="URL of the NATS cluster, nats://[user:password@]host:port[,...].")] = (
        "nats://127.0.0.1:4222"
    )

    def __post_init__(self) -> None:
        EtcdSettings.__post_init__(self)  # a class with slots is made twice, and super() knows the first one
        check_setting("nats", self.nats, parse_nats)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSettings(PlaneSettings):
    """What gateways and workers have in common: the planes they meet over, and their log."""

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Parameter(help="Least level to log.")] = "info"
    log_json: Annotated[bool, Parameter(help="Log JSON lines.")] = False


def command_line(name: str, summary: str) -> cyclopts.App:
    """A command line whose flags may also come from `HEADRACE_<FLAG>`, whatever the command."""
    return cyclopts.App(name=name, help=summary, config=Environment(), version_flags=[])


def run(app: cyclopts.App, arguments: list[str] | None = None) -> int:
    """Run the command that the arguments (else `sys.argv`) name.

    Returns:  the exit status; 2, after one line, if it could not start.
    """
    try:
        status = app(sys.argv[1:] if arguments is None else arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as exc:
        return _refused(redacted(str(exc)))  # it repeats what was typed
    except HeadraceError as exc:
        return _refused(str(exc))
    return status if isinstance(status, int) else 0


def _refused(reason: str) -> int:
    print(f"headrace: {' '.join(reason.split())}", file=sys.stderr)  # noqa: T201 - the command line's own answer
    return 2
