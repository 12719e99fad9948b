"""Starts a gateway on several processes: a socket of each on one port, a folder for all, and their parent (ADR 46)."""

import contextlib
import gc
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from app.http.server import listening
from app.processes.siblings import Place
from app.settings import GatewaySettings
from planes.wire.errors import UnusableSetting
from process.logging import configure
from process.parent import Begun, Parent

_LONGEST_SOCKET_PATH: Final = 107

Serve = Callable[[GatewaySettings, list[socket.socket], Place, Begun], None]


def serve_on_many(settings: GatewaySettings, serve: Serve) -> int:
    """Run `--processes` times `serve`, which gets the port's socket and, where there is one, the admin port's.

    Returns:  the exit status.  Raises:  UnusableSetting.
    """
    configure(settings.log_level, as_json=settings.log_json)
    secret = secrets.token_bytes(32)
    with contextlib.ExitStack() as held:
        folder = held.enter_context(_folder(settings.processes))
        ports = {"port": _claimed("port", settings.host, settings.port)}
        if settings.admin_port is not None:
            ports["admin_port"] = _claimed("admin_port", settings.admin_host, settings.admin_port)
        hosts = {"port": settings.host, "admin_port": settings.admin_host}

        def open_sockets() -> list[socket.socket]:
            return [listening(name, hosts[name], port, is_shared=True) for name, port in ports.items()]

        def run(number: int, sockets: list[socket.socket], begun: Begun) -> None:
            own = settings
            if settings.record is not None:  # a folder is one recorder's
                own = replace(settings, record=settings.record.expanduser() / f"process-{number}")
            serve(own, sockets, Place(number, settings.processes, folder, secret), begun)

        parent = Parent(settings.processes, open_sockets, run)
        gc.collect()
        gc.freeze()  # what is shared stays shared: the collectors of the processes leave it alone
        return parent.run()


def _claimed(name: str, host: str, port: int) -> int:
    """A port that nobody else listens on: sockets that share it would join those of another gateway.

    Raises:  UnusableSetting.
    """
    with listening(name, host, port) as probe:
        chosen: int = probe.getsockname()[1]
        return chosen


@contextlib.contextmanager
def _folder(num_processes: int) -> Iterator[Path]:
    """Where the processes meet; nobody else may look into it.  Raises:  UnusableSetting."""
    try:
        made = tempfile.TemporaryDirectory(prefix="headrace-", ignore_cleanup_errors=True)
    except OSError as exc:
        raise UnusableSetting("processes", num_processes, f"they need a folder for temporary files ({exc})") from exc
    with made as name:
        if len(f"{name}/{num_processes}.sock") > _LONGEST_SOCKET_PATH:
            raise UnusableSetting("processes", num_processes, f"TMPDIR is too long for a socket's path ({name})")
        yield Path(name)
