"""`headrace up`: etcd, NATS, workers and a gateway as child processes of one supervisor on this machine.

Order of life: checks that cost nothing → etcd, NATS → workers (side by side) → gateway → ready; then it waits. The end
goes the other way round, whatever caused it. What dies after it was ready is started again, with pauses that
grow; what dies before ends everything with its last words.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from app.auth import is_open_to_others
from app.cli.certs import CertSet, CertsSettings, make_certs
from app.cli.servers import ServerHandle, ServerNotStarted, etcd_server, free_port, nats_server
from app.cli.supervisor import Child, Supervisor, ending, keep_running, say
from app.keys.file import load_keys
from app.settings import GatewaySettings, check_admin_port
from planes.wire.errors import UnusableSetting
from planes.wire.messages import Role
from planes.wire.names import check_namespace
from planes.wire.urls import parse_etcd, parse_nats, redacted
from process.environment import variable, without_strangers
from process.paths import DEMO_MODEL, cache_dir, is_hub_id
from process.programs import program
from process.settings import check_pair, check_setting
from router.policies import load_policy
from workers.settings import WorkerSettings

_LOCK = "headrace.lock"
"""Locked in the state directory while `headrace up` runs there; its presence says that the directory is ours."""
_HEALTH_S = 10.0
"""For the gateway's answer whether it serves; it is asked again."""
_DEAD_AFTER_S = "20"
"""For a fleet of this machine alone. A process that dies here closes its connections; one that is silent gets no turn:
6 s were seen where vLLM and something else use the cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    """Everything `headrace up` needs to know. Other settings of gateway and workers come from `HEADRACE_*`."""

    engine: Annotated[Literal["vllm", "sim"], Parameter(help="What computes: a real model or simulated time.")] = "vllm"
    model: Annotated[
        str | None,
        Parameter(
            help="Directory of a model, or its id at the Hugging Face hub. Default: the demo model, SmolLM2 135M; for "
            "sim, none."
        ),
    ] = None
    served_model_name: Annotated[
        str | None, Parameter(help="Name that clients use. Default: the directory's name, or the hub's id.")
    ] = None
    prefill: Annotated[int, Parameter(help="Number of prefill workers.")] = 1
    decode: Annotated[int, Parameter(help="Number of decode workers.")] = 1
    both: Annotated[int, Parameter(help="Number of workers that do both.")] = 0
    handover: Annotated[
        Literal["pull", "push", "none"],
        Parameter(help="Who moves the KV cache: the decode worker, the prefill worker, or nobody."),
    ] = "pull"
    policy: Annotated[str, Parameter(help="Routing policy: a name, or package.module:Class of your own.")] = "headrace"
    api_keys_file: Annotated[
        Path | None, Parameter(help="TOML file with the API keys that may ask. Default: everybody may.")
    ] = None
    api_keys: Annotated[
        bool,
        Parameter(help="Ask for API keys of those in etcd: headrace keys. May go with --api-keys-file.", negative=""),
    ] = False
    console: Annotated[bool, Parameter(help="Serve the console.")] = True
    admin_port: Annotated[
        int | None, Parameter(help="A port of its own for operators: metrics, fleet, console. Default: the gateway's.")
    ] = None
    host: Annotated[str, Parameter(help="Address that the gateway listens on.")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="Port that the gateway listens on.")] = 8000
    processes: Annotated[int, Parameter(help="Processes of the gateway, on one port.")] = 1
    tls_cert: Annotated[
        Path | None, Parameter(help="PEM file: the gateway's certificate for HTTPS. Default: plain HTTP.")
    ] = None
    tls_key: Annotated[Path | None, Parameter(help="PEM file: its key.")] = None
    secure: Annotated[
        bool,
        Parameter(
            help="HTTPS, and TLS between all that runs here, with certificates made in the state directory.",
            negative="",
        ),
    ] = False
    insecure: Annotated[
        bool, Parameter(help="Listen where others reach this machine although there is no key.", negative="")
    ] = False
    etcd: Annotated[str | None, Parameter(help="URL of an etcd cluster. Default: start one here.")] = None
    nats: Annotated[str | None, Parameter(help="URL of a NATS cluster. Default: start one here.")] = None
    namespace: Annotated[str, Parameter(help="Separates fleets that share etcd and NATS.")] = "local"
    state_dir: Annotated[
        Path | None,
        Parameter(help="Where etcd, NATS and the logs live. Default: run/PORT in HEADRACE_CACHE (~/.cache/headrace)."),
    ] = None
    ready_timeout_s: Annotated[float, Parameter(help="Longest start of one process, in seconds.")] = 600.0

    def __post_init__(self) -> None:
        for name in ("prefill", "decode", "both"):
            if getattr(self, name) < 0:
                raise UnusableSetting(name, getattr(self, name), "a number of workers is 0 or more")
        if self.processes < 1:
            raise UnusableSetting("processes", self.processes, "it must be 1 or more")
        if self.decode + self.both < 1:
            raise UnusableSetting(
                "decode", self.decode, "at least one worker must decode: --decode or --both 1 or more"
            )
        _check_ports(self)
        if self.etcd is not None:
            check_setting("etcd", self.etcd, parse_etcd)
        if self.nats is not None:
            check_setting("nats", self.nats, parse_nats)
        check_setting("namespace", self.namespace, check_namespace)
        _check_tls(self)
        if ":" not in self.policy:  # a class of the user's is for the gateway to import
            check_setting("policy", self.policy, load_policy)
        if self.api_keys_file is not None:
            check_setting("api_keys_file", str(self.api_keys_file), lambda name: load_keys(Path(name)))
        needed = "config.json" if self.engine == "vllm" else "tokenizer.json"
        if self.model is not None and not is_hub_id(self.model) and not Path(self.model, needed).is_file():
            raise UnusableSetting("model", self.model, f"not the directory of a model (it has no {needed})")


def _check_ports(settings: UpSettings) -> None:
    """Both are told before they are listened on: 0 would be any."""
    check_admin_port(settings.admin_port, settings.port)
    for name in ("port", "admin_port"):
        value = getattr(settings, name)
        if value is not None and not 1 <= value <= 65535:
            raise UnusableSetting(name, value, "a port is 1 to 65535")


def _check_tls(settings: UpSettings) -> None:
    check_pair(settings, "tls_cert", "tls_key")
    for name in ("etcd", "nats", "tls_cert"):
        value = getattr(settings, name)
        if settings.secure and value is not None:
            allowed = (
                "--secure makes certificates, and for what it starts itself; for your own there is HEADRACE_PLANE_CA"
            )
            raise UnusableSetting(name, str(value), allowed)


async def run_everything(settings: UpSettings) -> int:
    """Run everything until SIGINT, SIGTERM or SIGHUP; a second one ends at once what still runs.

    Returns the exit status.  Raises:  HeadraceError before it is ready.
    """
    _refuse_taken_port("port", settings.host, settings.port)
    if settings.admin_port is not None:
        _refuse_taken_port("admin_port", "127.0.0.1", settings.admin_port)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, signalled)
    started_at = time.monotonic()
    state = settings.state_dir or cache_dir() / "run" / str(settings.port)
    async with AsyncExitStack() as stack:
        _take_state_dir(state, stack, is_ours=settings.state_dir is None)
        certs = make_certs(state / "certs", _names(settings)) if settings.secure else None
        if certs is not None:
            settings = replace(settings, secure=False, tls_cert=certs.server[0], tls_key=certs.server[1])
        etcd, nats = await _servers(settings, state, stack, certs)
        supervisor = Supervisor(settings.ready_timeout_s, stop, hurry)
        stack.push_async_callback(supervisor.stop_all)
        children = _worker_children(settings, etcd, nats, state)
        children.append(_gateway_child(settings, etcd, nats, state, len(children)))
        for child in children:
            child.environment |= _told(certs)
        await supervisor.start(children)
        if not stop.is_set():
            exported = [_exported(etcd, nats, settings.namespace), *(f"{k}={v}" for k, v in _told(certs).items())]
            say(f"export {' '.join(exported)} for headrace fleet, config and keys")
            _announce(settings, _served_name(settings), time.monotonic() - started_at, state, certs)
        await supervisor.watch()
        say("stopping; streams that run may finish (Ctrl-C again: they may not) …")
    say("stopped")
    return 0


def _names(settings: UpSettings) -> CertsSettings:
    """For whom the certificates are: this machine, and the address that the gateway listens on."""
    local = CertsSettings().host
    own = () if settings.host in (*local, "0.0.0.0", "::") else (settings.host,)
    return CertsSettings(host=(*local, *own))


def _told(certs: CertSet | None) -> dict[str, str]:
    """Variables that tell a process which certificates and which token are the fleet's."""
    return {} if certs is None else {variable(name): value for name, value in certs.flags.items()}


def _exported(etcd: str, nats: str, namespace: str) -> str:
    """What the other commands need; an address with a secret in it came by variable and is known."""
    named = {"etcd": etcd, "nats": nats, "namespace": namespace}
    return " ".join(f"{variable(name)}={value}" for name, value in named.items() if redacted(value) == value)


def _take_state_dir(state: Path, stack: AsyncExitStack, *, is_ours: bool) -> None:
    """Make the folder ours until the end.  Raises:  UnusableSetting if somebody runs in it, or has something there."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        is_ours = is_ours or (state / _LOCK).exists()
        for folder in (state / "etcd", state / "nats"):
            if folder.exists() and not is_ours:
                raise UnusableSetting("state_dir", state, f"{folder} is not headrace's and would be lost; take another")
        lock = stack.enter_context((state / _LOCK).open("a"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise UnusableSetting("state_dir", state, "another headrace up runs in it; take another") from exc
    except OSError as exc:
        raise UnusableSetting("state_dir", state, f"it cannot be used ({exc.strerror}); take another") from exc


async def _servers(settings: UpSettings, state: Path, stack: AsyncExitStack, certs: CertSet | None) -> tuple[str, str]:
    """URLs of etcd and NATS, kept running here where none is given. What an earlier run left behind is thrown away."""
    urls = []
    for name, given, server in (("etcd", settings.etcd, etcd_server), ("nats", settings.nats, nats_server)):
        if given is not None:
            urls.append(given)
            continue
        shutil.rmtree(state / name, ignore_errors=True)
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        port = free_port(name, 0, but=(settings.port, settings.admin_port))
        keeper = asyncio.create_task(
            keep_running(partial(_run_server, name, partial(server, certs=certs), state / name, port, url))
        )
        stack.push_async_callback(_cancelled, keeper)
        await asyncio.wait((url, keeper), return_when=asyncio.FIRST_COMPLETED)
        if not url.done():
            await keeper  # it raises why
        say(f"{name} is ready at {url.result()}")
        urls.append(url.result())
    return urls[0], urls[1]


async def _run_server(
    name: str,
    server: Callable[[Path, int], AbstractAsyncContextManager[ServerHandle]],
    folder: Path,
    port: int,
    url: asyncio.Future[str],
) -> str:
    """Run a server, with the data of its first time, until it ends.  url: set once it answers.

    Returns:  how it ended.  Raises:  ServerNotStarted the first time.
    """
    try:
        async with server(folder, port) as handle:
            if url.done():
                say(f"{name} is ready again")
            else:
                url.set_result(handle.url)
            status = await handle.ended()
    except ServerNotStarted as exc:
        if not url.done():
            raise
        return str(exc)
    return f"{ending(name, status, 'see its log')} ({handle.log})"


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _worker_children(settings: UpSettings, etcd: str, nats: str, state: Path) -> list[Child]:
    roles = [Role.PREFILL] * settings.prefill + [Role.DECODE] * settings.decode + [Role.BOTH] * settings.both
    cores = _share_cores(len(roles))
    counts: dict[Role, int] = {}
    children = []
    for role, own_cores in zip(roles, cores, strict=True):
        counts[role] = counts.get(role, 0) + 1
        name = f"{role}-{counts[role]}"
        argv = program("workers", "--role", role, "--engine", settings.engine, "--worker-id", name)
        argv += ["--namespace", settings.namespace]
        argv += ["--host", "127.0.0.1", "--port", "0", "--handover", settings.handover]
        argv += ["--model", settings.model] if settings.model else []
        argv += ["--served-model-name", _served_name(settings)]
        argv += ["--cores", own_cores] if settings.engine == "vllm" else []
        children.append(Child(name, argv, state / f"{name}.log", _environment(settings, WorkerSettings, etcd, nats)))
    return children


def _gateway_child(settings: UpSettings, etcd: str, nats: str, state: Path, num_workers: int) -> Child:
    argv = program("app.cli", "gateway", "--host", settings.host, "--port", str(settings.port))
    argv += ["--namespace", settings.namespace, "--policy", settings.policy]
    argv += ["--api-keys-file", str(settings.api_keys_file)] if settings.api_keys_file else []
    argv += ["--api-keys"] if settings.api_keys else []
    argv += [] if settings.console else ["--no-console"]
    argv += ["--admin-port", str(settings.admin_port)] if settings.admin_port is not None else []
    argv += ["--tls-cert", str(settings.tls_cert), "--tls-key", str(settings.tls_key)] if settings.tls_cert else []
    argv += ["--insecure"] if settings.insecure else []
    argv += ["--processes", str(settings.processes)]
    return Child(
        "gateway",
        argv,
        state / "gateway.log",
        _environment(settings, GatewaySettings, etcd, nats),
        probe=lambda: _serves(settings, num_workers),
    )


def _environment(
    settings: UpSettings, child: type[GatewaySettings | WorkerSettings], etcd: str, nats: str
) -> dict[str, str]:
    """What a child is told this way: what it reads of ours, and addresses, whose passwords `ps` would show."""
    names = [field.name for field in fields(child)]
    is_one_machine = settings.etcd is None
    patience = {variable("dead_after_s"): _DEAD_AFTER_S} if is_one_machine else {}
    return patience | without_strangers(os.environ, names) | {variable("etcd"): etcd, variable("nats"): nats}


def _share_cores(num_workers: int) -> list[str]:
    """For each worker the CPU cores it may have, `0,1`: a prefill must not stall a decode by sharing its core."""
    cores = sorted(os.sched_getaffinity(0))
    if num_workers >= len(cores):
        return [str(cores[i % len(cores)]) for i in range(num_workers)]
    share = len(cores) // num_workers
    return [",".join(str(c) for c in cores[i * share : (i + 1) * share]) for i in range(num_workers)]


def _served_name(settings: UpSettings) -> str:
    """What the workers will call the model."""
    if settings.served_model_name:
        return settings.served_model_name
    if settings.model is None:
        return DEMO_MODEL if settings.engine == "vllm" else "sim"
    return settings.model if is_hub_id(settings.model) else Path(settings.model).resolve().name


def _refuse_taken_port(name: str, host: str, port: int) -> None:
    """Raises:  UnusableSetting."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as exc:
        raise UnusableSetting(name, port, f"{host}:{port} cannot be had ({exc.strerror}); take another") from exc


def _reachable(host: str) -> str:
    """Where this machine finds what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


async def _serves(settings: UpSettings, num_workers: int) -> bool:
    """Whether all the gateway's processes answer and have connected to every worker."""
    try:
        # Its certificate may be for whatever name clients use: nobody is told anything here, and it is our own child.
        tls = ssl._create_unverified_context() if settings.tls_cert is not None else None  # noqa: S323, SLF001
        async with asyncio.timeout(_HEALTH_S):
            reader, writer = await asyncio.open_connection(_reachable(settings.host), settings.port, ssl=tls)
            with contextlib.closing(writer):
                writer.write(b"GET /health HTTP/1.1\r\nHost: headrace\r\nConnection: close\r\n\r\n")
                reply = await reader.read()
    except (OSError, TimeoutError):
        return False
    connected = re.search(rb'"workers":(\d+)', reply)  # others may share the namespace
    there = re.search(rb'"processes":(\d+)', reply)  # one alone does not tell
    return (
        reply.startswith(b"HTTP/1.1 200")
        and connected is not None
        and int(connected[1]) >= num_workers
        and (1 if there is None else int(there[1])) >= settings.processes
    )


def _announce(settings: UpSettings, model: str, seconds: float, state: Path, certs: CertSet | None = None) -> None:
    host = _reachable(settings.host)
    scheme = "http" if settings.tls_cert is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"
    ca = "" if certs is None else f" --cacert {certs.ca}"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}], '
    body += '"temperature": 0, "max_tokens": 64, "stream": true}'
    say(f"ready after {seconds:.1f} s; logs in {state}; Ctrl-C stops everything")
    if is_open_to_others(settings.host, settings.api_keys_file, has_stored_keys=settings.api_keys):
        say(f"warning: {settings.host} lets everybody in who reaches this machine; --api-keys-file asks for keys")
    if settings.api_keys:
        kept = "" if settings.etcd is not None else "; they are gone when this ends, as its etcd is"
        say(f"headrace keys create NAME makes a key and shows it, once{kept}")
    if settings.prefill:
        say("the router would serve a prompt as short as the one below where it decodes; its second header says not to")
    operators = url if settings.admin_port is None else f"{scheme}://127.0.0.1:{settings.admin_port}"
    if settings.console:
        say(f"the console is at {operators}/console")
    if settings.admin_port is not None:
        say(f"headrace top and doctor ask at {operators}: --url")
    print(f"\nHeadrace listens on {url}\n")
    print(f"  curl -N{ca} {url}/v1/chat/completions -H 'content-type: application/json' \\")
    if settings.prefill:
        print("    -H 'x-headrace-handover: always' \\")
    if settings.api_keys_file or settings.api_keys:
        print("    -H 'authorization: Bearer YOUR_KEY' \\")
    print(f"    -d '{body}'\n", flush=True)
