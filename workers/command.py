"""The command line of a worker: `headrace worker --role decode --engine sim …`."""

import asyncio
import shlex
import signal
from dataclasses import replace
from functools import partial
from typing import Annotated

import uvloop
from cyclopts import Parameter

from planes.wire.errors import UnusableSetting
from process import logging as logs
from process.settings import command_line
from workers.demo_model.convert import ensure_demo_model
from workers.hub import fetched_model
from workers.main import Ending, progressed, serve
from workers.settings import WorkerSettings

app = command_line(
    "headrace worker",
    "A serving process: an engine, and what connects it to gateways.",
)


@app.default
def main(
    *engine_words: Annotated[str, Parameter(name="engine_arguments", show_env_var=False, help="After --: vLLM's own.")],
    settings: Annotated[WorkerSettings | None, Parameter(name="*")] = None,
) -> int:
    """Run a worker until SIGTERM or SIGINT; it then finishes what it has, for --drain-s at most."""
    settings = with_engine_words(settings or WorkerSettings(), engine_words)
    logs.configure(settings.log_level, as_json=settings.log_json)
    settings = settings.with_model(
        partial(ensure_demo_model, progress=progressed), partial(fetched_model, progress=progressed)
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings))


def with_engine_words(settings: WorkerSettings, words: tuple[str, ...]) -> WorkerSettings:
    """Those after -- count more than those of --engine-args.  Raises:  UnusableSetting."""
    if not words:
        return settings
    if not words[0].startswith("-"):
        raise UnusableSetting("engine_args", shlex.join(words), "engine arguments begin with one that is a flag")
    return replace(settings, engine_args=f"{settings.engine_args} {shlex.join(words)}".strip())


async def _serve(settings: WorkerSettings) -> int:
    ending = Ending()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.asked)
    return await serve(settings, ending)
