"""What every process has that is a worker to its fleet, be the engine its own or somebody else's."""

import ipaddress
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from planes.security.files import read_secret
from planes.security.tls import http_tls
from planes.wire.errors import UnusableSetting
from planes.wire.messages import Role
from planes.wire.urls import is_loopback
from process.settings import ProcessSettings, check_setting

_WORKER_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ANY_HOST = ("", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings(ProcessSettings):
    """Where it is reached, what watches it, and how long it waits.  Raises:  UnusableSetting."""

    role: Annotated[Literal["prefill", "decode", "both"], Parameter(help="What this worker is for.")] = "both"
    worker_id: Annotated[
        str | None, Parameter(help="Name in the fleet; that of a running worker is refused. Default: ROLE-xxxxxx.")
    ] = None
    host: Annotated[str, Parameter(help="Address to listen on, for gateways and for this process's handovers.")] = (
        "127.0.0.1"
    )
    advertise_host: Annotated[
        str | None,
        Parameter(
            help="Address under which others reach this worker. Default: --host; if that is every address, the one "
            "that this machine's name stands for."
        ),
    ] = None
    port: Annotated[int, Parameter(help="Port to listen on for gateways; 0 takes a free one.")] = 0
    metrics_port: Annotated[
        int | None,
        Parameter(
            help="Port for GET /metrics (Prometheus, under vLLM's names too) and GET /live; 0 takes a free one. HTTPS "
            "where there is a --plane-cert. Default: none."
        ),
    ] = None
    metrics_token_file: Annotated[
        Path | None,
        Parameter(
            help="File with a secret that GET /metrics asks for, as Authorization: Bearer SECRET. Without it nobody "
            "reads them if --host is an address that others reach, unless --insecure says so."
        ),
    ] = None
    max_queued: Annotated[int, Parameter(help="Most requests taken beyond --max-batch.")] = 1024
    heartbeat_s: Annotated[float, Parameter(help="Silence on a gateway's stream before a ping, in seconds.")] = 1.0
    dead_after_s: Annotated[
        float, Parameter(help="Silence on a gateway's stream after which the gateway counts as gone, in seconds.")
    ] = 3.0
    drain_s: Annotated[float, Parameter(help="Longest wait for running requests at shutdown, in seconds.")] = 30.0

    def __post_init__(self) -> None:
        ProcessSettings.__post_init__(self)
        _check_ports(self)
        _check_metrics(self)
        _check_times(self)
        if self.worker_id is not None and _WORKER_ID.fullmatch(self.worker_id) is None:
            allowed = "it must be 1 to 64 of the characters A-Z a-z 0-9 _ . -"
            raise UnusableSetting("worker_id", self.worker_id, allowed)
        if self.public_host in _ANY_HOST:
            allowed = f"name an address under which others reach this machine; --host {self.host} is none"
            raise UnusableSetting("advertise_host", self.advertise_host, allowed)

    @property
    def worker_role(self) -> Role:
        return Role(self.role)

    @property
    def public_host(self) -> str:
        """Where others reach this worker."""
        if self.advertise_host is not None or self.host not in _ANY_HOST:
            return self.advertise_host or self.host
        return own_address() or self.host

    @property
    def has_open_metrics(self) -> bool:
        """Whether who reaches `--metrics-port` may read."""
        return self.metrics_token_file is None and (self.insecure or is_loopback(self.host))

    def new_worker_id(self) -> str:
        """The name given, or a new one at each call."""
        return self.worker_id or f"{self.role}-{secrets.token_hex(3)}"


def _check_ports(settings: ServingSettings) -> None:
    for name in ("port", "metrics_port"):
        if not 0 <= (getattr(settings, name) or 0) <= 65535:
            raise UnusableSetting(name, getattr(settings, name), "a port is 0 to 65535")


def _check_metrics(settings: ServingSettings) -> None:
    cert, key, token = settings.plane_cert, settings.plane_key, settings.metrics_token_file
    if token is not None:
        check_setting("metrics_token_file", str(token), lambda name: read_secret(Path(name)))
    if settings.metrics_port is not None and cert is not None and key is not None:
        check_setting("plane_cert", str(cert), lambda _: http_tls(cert, key))


def _check_times(settings: ServingSettings) -> None:
    for name in ("max_queued", "drain_s"):
        if not getattr(settings, name) >= 0:
            raise UnusableSetting(name, getattr(settings, name), "it must be 0 or more")
    for name in ("heartbeat_s", "dead_after_s"):
        if not getattr(settings, name) > 0:
            raise UnusableSetting(name, getattr(settings, name), "it must be more than 0")
    if settings.dead_after_s <= settings.heartbeat_s:
        allowed = f"it must exceed --heartbeat-s ({settings.heartbeat_s})"
        raise UnusableSetting("dead_after_s", settings.dead_after_s, allowed)


def own_address(name: Callable[[], str] = socket.gethostname) -> str | None:
    """The address that this machine's name stands for, as containers and pods have one, if others can use it."""
    try:
        address = str(socket.getaddrinfo(name(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None
    return None if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address
