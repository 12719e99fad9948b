"""The command line `headrace`: one command per process, and `up` for all of them."""

import asyncio
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from app.cli import servers
from app.cli.config import ConfigSettings, change_config, live_settings
from app.cli.fleet import FleetTableSettings, show
from app.cli.up import UpSettings, run_everything
from app.settings import GatewaySettings
from process.settings import command_line, run

app = command_line(
    "headrace",
    "A disaggregated LLM serving gateway: prefill and decode on different workers, KV cache over NIXL. "
    "Every flag may also come from the environment: --etcd as HEADRACE_ETCD, --log-json as HEADRACE_LOG_JSON.",
)
app.version = lambda: importlib.metadata.version("headrace")
app.version_flags = ["--version"]

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
_DataDir = Annotated[Path | None, Parameter(help="Where its data lives. Default: a new temporary folder.")]


def main() -> None:
    """Entry point of the distribution."""
    sys.exit(run(app))


@app.command
def up(settings: Annotated[UpSettings | None, _FLAGS] = None) -> int:
    """Run everything on this machine: etcd, NATS, workers and a gateway. Ctrl-C stops it all."""
    return asyncio.run(run_everything(settings or UpSettings()))


@app.command
def gateway(settings: Annotated[GatewaySettings | None, _FLAGS] = None) -> None:
    """Run a gateway: OpenAI's HTTP API in front of the workers that etcd knows."""
    from app.main import serve  # noqa: PLC0415 - half a second that no other command should pay

    serve(settings or GatewaySettings())


@app.command(help_flags=[])
def worker(*flags: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Run a worker; `headrace worker --help` lists its settings."""
    os.execv(sys.executable, [sys.executable, "-m", "workers", *flags])  # noqa: S606 - no shell is the point


@app.command
def etcd(*, host: _Host = "127.0.0.1", port: _Port = 2379, data_dir: _DataDir = None) -> None:
    """Run a single etcd, for one machine and for tests; production has a cluster of its own."""
    port = servers.free_port("etcd", port, host)
    servers.run_in_foreground(servers.etcd_argv(data_dir or _scratch("etcd"), port, host))


@app.command
def nats(*, host: _Host = "127.0.0.1", port: _Port = 4222, data_dir: _DataDir = None) -> None:
    """Run a single NATS server with JetStream, for one machine and for tests."""
    port = servers.free_port("nats", port, host)
    servers.run_in_foreground(servers.nats_argv(data_dir or _scratch("nats"), port, host))


@app.command
def fleet(settings: Annotated[FleetTableSettings | None, _FLAGS] = None) -> int:
    """Show which workers are registered, and what they are doing."""
    return asyncio.run(show(settings or FleetTableSettings()))


@app.command
def config(*changes: _Changes, settings: Annotated[ConfigSettings | None, _FLAGS] = None) -> None:
    """Show the routing settings that gateways follow while they run, or change them: headrace config policy=dynamo

    What is not set, or set to null, is as each gateway was started.
    """
    print(asyncio.run(change_config(changes, settings or ConfigSettings())))


def _scratch(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"headrace-{name}-"))
