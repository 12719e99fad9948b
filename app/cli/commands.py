"""The command line `headrace`: one command per process, and `up` for all of them."""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from app.cli import servers
from app.cli.certs import CertsSettings, make_certs, told
from app.cli.chat import ChatSettings, typed
from app.cli.chat import chat as run_chat
from app.cli.config import ConfigSettings, change_config, live_settings
from app.cli.doctor import DoctorSettings, examine
from app.cli.fleet import FleetTableSettings, show
from app.cli.gateway_url import GatewayUrlSettings
from app.cli.keys import KeySettings, RotateSettings, create_key, list_keys, revoke_key, rotate_key
from app.cli.role import RoleSettings, change_role
from app.cli.top import TopSettings
from app.cli.top import top as show_top
from app.cli.trace import trace as show_trace
from app.cli.up import UpSettings, run_everything
from app.settings import GatewaySettings
from planes.wire.errors import HeadraceError
from planes.wire.messages import Role, WorkerId
from process.environment import strangers
from process.programs import program
from process.settings import EtcdSettings, command_line
from process.signals import hold_sigterm
from workers.adopted.settings import AdoptSettings
from workers.settings import WorkerSettings

app = command_line(
    "headrace",
    "A disaggregated LLM serving gateway: prefill and decode on different workers, KV cache over NIXL. "
    "Every flag may also come from the environment: --etcd as HEADRACE_ETCD, --log-json as HEADRACE_LOG_JSON.",
)
app.version = lambda: importlib.metadata.version("headrace")
app.version_flags = ["--version"]

_EVERYTHING = (
    UpSettings,
    GatewaySettings,
    WorkerSettings,
    AdoptSettings,
    FleetTableSettings,
    ConfigSettings,
    RoleSettings,
    KeySettings,
    RotateSettings,
    GatewayUrlSettings,
    ChatSettings,
    TopSettings,
    DoctorSettings,
)
"""What variables may say in the shell where small commands run: that of a fleet's operator."""
_FLAGS = Parameter(name="*")
_Port = Annotated[int, Parameter(help="Port to listen on.")]
_Host = Annotated[str, Parameter(help="Address to listen on.")]
_Changes = Annotated[
    str,
    Parameter(
        name="changes",
        show_env_var=False,
        help="NAME=VALUE. The names, and what counts where they are not set:\n\n"
        + "\n".join(f"- {each.name} ({each.otherwise}): {each.meaning}" for each in live_settings()),
    ),
]
_WorkerName = Annotated[str, Parameter(show_env_var=False, help="Its name in the fleet: headrace fleet.")]
_RequestId = Annotated[str, Parameter(show_env_var=False, help="As `x-request-id` of its answer said.")]
_Role = Annotated[
    Literal["prefill", "decode", "both", "auto"],
    Parameter(
        show_env_var=False, help="What it shall be; auto: what --autorole makes of it, which nothing else undoes."
    ),
]
_Tenant = Annotated[str, Parameter(show_env_var=False, help="Whose it is: the name in metrics, shares and usage.")]
_KeyId = Annotated[str, Parameter(show_env_var=False, help="Its id, which is no secret: headrace keys list.")]
_DataDir = Annotated[Path | None, Parameter(help="Where its data lives. Default: a new temporary folder.")]


@app.command
def up(settings: Annotated[UpSettings | None, _FLAGS] = None) -> int:
    """Run everything on this machine: etcd, NATS, workers and a gateway. Ctrl-C stops it all."""
    settings = settings or UpSettings()
    _tell_strangers(UpSettings, GatewaySettings, WorkerSettings)
    return asyncio.run(run_everything(settings))


@app.command
def gateway(settings: Annotated[GatewaySettings | None, _FLAGS] = None) -> int:
    """Run a gateway: OpenAI's HTTP API in front of the workers that etcd knows."""
    from app.main import serve  # noqa: PLC0415 - half a second that no other command should pay

    settings = settings or GatewaySettings()
    _tell_strangers(GatewaySettings)
    return serve(settings)


@app.command(help_flags=[], end_of_options_delimiter="")  # what follows -- is for the worker's engine
def worker(*flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False, show_env_var=False)]) -> None:
    """Run a worker; `headrace worker --help` lists its settings."""
    _tell_strangers(WorkerSettings)
    hold_sigterm()
    os.execv(sys.executable, program("workers", *flags))  # noqa: S606 - no shell is the point


@app.command(help_flags=[])
def adopt(*flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False, show_env_var=False)]) -> None:
    """Join a running, unmodified vLLM server to the fleet: headrace adopt http://host:port --role decode

    `headrace adopt --help` lists its settings; docs/adopt.md tells how the server is started.
    """
    _tell_strangers(AdoptSettings)
    hold_sigterm()
    os.execv(sys.executable, program("workers.adopted", *flags))  # noqa: S606 - no shell is the point


@app.command(help_flags=[])
def plan(*flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False, show_env_var=False)]) -> None:
    """Find the cheapest fleet for a load and an SLO, by simulation; `headrace plan --help` lists its settings."""
    if importlib.util.find_spec("loadtest") is None:
        raise NotInstalled("headrace plan", "the simulator in loadtest/, which comes with the source alone")
    os.execv(sys.executable, program("loadtest.plan", *flags))  # noqa: S606 - no shell is the point


@app.command
def etcd(*, host: _Host = "127.0.0.1", port: _Port = 2379, data_dir: _DataDir = None) -> None:
    """Run a single etcd, for one machine and for tests; production has a cluster of its own."""
    _tell_strangers(*_EVERYTHING)
    port = servers.free_port("etcd", port, host)
    servers.run_in_foreground(servers.etcd_argv(data_dir or _scratch("etcd"), port, host))


@app.command
def nats(*, host: _Host = "127.0.0.1", port: _Port = 4222, data_dir: _DataDir = None) -> None:
    """Run a single NATS server with JetStream, for one machine and for tests."""
    _tell_strangers(*_EVERYTHING)
    port = servers.free_port("nats", port, host)
    servers.run_in_foreground(servers.nats_argv(data_dir or _scratch("nats"), port, host))


@app.command
def certs(
    folder: Annotated[Path, Parameter(show_env_var=False, help="Where they go; made if it is not there.")],
    /,
    *,
    settings: Annotated[CertsSettings | None, Parameter(name="*", show_env_var=False)] = None,
) -> None:
    """Make a CA, certificates and a token for trying a secured fleet out, or renew them: headrace certs certs

    The CA and the token that are there stay.
    """
    print(told(make_certs(folder, settings or CertsSettings())))


@app.command
def fleet(settings: Annotated[FleetTableSettings | None, _FLAGS] = None) -> int:
    """Show which workers are registered, and what they are doing."""
    settings = settings or FleetTableSettings()
    _tell_strangers(*_EVERYTHING)
    return asyncio.run(show(settings))


@app.command
def config(*changes: _Changes, settings: Annotated[ConfigSettings | None, _FLAGS] = None) -> None:
    """Show the routing settings that gateways follow while they run, or change them: headrace config policy=dynamo

    What is not set, or set to null, is as each gateway was started.
    """
    settings = settings or ConfigSettings()
    _tell_strangers(*_EVERYTHING)
    print(asyncio.run(change_config(changes, settings)))


@app.command
def role(worker: _WorkerName, role: _Role, /, *, settings: Annotated[RoleSettings | None, _FLAGS] = None) -> int:
    """Change the role of a running worker: headrace role decode-2 prefill

    It ends what it will not do any more first. Exit status 1: it has not become that within --wait-s. --autorole leaves
    it alone from then on; headrace role decode-2 auto gives it back.
    """
    settings = settings or RoleSettings()
    _tell_strangers(*_EVERYTHING)
    is_changed, told = asyncio.run(change_role(WorkerId(worker), None if role == "auto" else Role(role), settings))
    print(told)
    return 0 if is_changed else 1


keys = command_line("keys", "API keys in etcd, for gateways with --api-keys; all of them follow at once.")
app.command(keys)


@keys.command(name="create")
def create(tenant: _Tenant, /, *, settings: Annotated[KeySettings | None, _FLAGS] = None) -> None:
    """Make a key: headrace keys create search --tokens-per-minute 200000

    Its secret is shown once, alone on the standard output, and kept by nobody.
    """
    settings = settings or KeySettings()
    _tell_strangers(*_EVERYTHING)
    name, secret = asyncio.run(create_key(tenant, settings, now=datetime.now(UTC)))
    print(f"key {name}; its secret, which nobody can show again:", file=sys.stderr)
    print(secret)


@keys.command(name="list")
def list_(settings: Annotated[EtcdSettings | None, _FLAGS] = None) -> None:
    """Show the keys and what they allow, without their secrets."""
    settings = settings or EtcdSettings()
    _tell_strangers(*_EVERYTHING)
    print(asyncio.run(list_keys(settings, now=datetime.now(UTC))))


@keys.command
def revoke(key: _KeyId, /, *, settings: Annotated[EtcdSettings | None, _FLAGS] = None) -> None:
    """End a key at once: headrace keys revoke key_0123456789ab"""
    settings = settings or EtcdSettings()
    _tell_strangers(*_EVERYTHING)
    asyncio.run(revoke_key(key, settings))


@keys.command
def rotate(key: _KeyId, /, *, settings: Annotated[RotateSettings | None, _FLAGS] = None) -> None:
    """Give a key another secret: headrace keys rotate key_0123456789ab --grace-s 86400

    The secret before works on for the grace period; limits and usage are those of the key.
    """
    settings = settings or RotateSettings()
    _tell_strangers(*_EVERYTHING)
    print(asyncio.run(rotate_key(key, settings, now=datetime.now(UTC))))


@app.command
def trace(request: _RequestId = "", /, *, settings: Annotated[GatewayUrlSettings | None, _FLAGS] = None) -> None:
    """Show where a request's time went, and why it went where it went: headrace trace ID

    The id is `x-request-id` of its answer. Without one: the last requests.
    """
    settings = settings or GatewayUrlSettings()
    _tell_strangers(*_EVERYTHING)
    show_trace(request, settings)


@app.command
def chat(settings: Annotated[ChatSettings | None, _FLAGS] = None) -> None:
    """Talk to a model: a line is a question, answers are streamed, with which workers served them. Ctrl-D ends it."""
    settings = settings or ChatSettings()
    _tell_strangers(*_EVERYTHING)
    run_chat(settings, asked=typed())


@app.command
def top(settings: Annotated[TopSettings | None, _FLAGS] = None) -> None:
    """Show what the fleet does, live, until Ctrl-C."""
    settings = settings or TopSettings()
    _tell_strangers(*_EVERYTHING)
    with contextlib.suppress(KeyboardInterrupt):
        show_top(settings)


@app.command
def doctor(settings: Annotated[DoctorSettings | None, _FLAGS] = None) -> int:
    """Look at this machine, etcd, NATS, workers and a gateway, and say what to do. Exit status 1: all is not well."""
    settings = settings or DoctorSettings()
    _tell_strangers(*_EVERYTHING)
    return asyncio.run(examine(settings))


class NotInstalled(HeadraceError):  # noqa: N818 - names what is wrong
    """A command needs what is not here."""

    code = "not_installed"

    def __init__(self, command: str, needs: str) -> None:
        super().__init__(f"{command} needs {needs}: pip install -e . in a checkout")


def _scratch(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"headrace-{name}-"))


def _tell_strangers(*settings: type) -> None:
    """One line for every `HEADRACE_*` variable that none of these settings reads: most are misspelt."""
    names = ["data_dir", *(field.name for each in settings for field in fields(each))]
    for stranger in strangers(os.environ, names):
        print(f"headrace: {stranger}", file=sys.stderr)
