"""Every command from a folder that has packages of our names, and of what we import: none of them may run."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.processes import free_port
from tests.up import start_up

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

HEADRACE = str(Path(sys.executable).with_name("headrace"))
NAMES = ("app", "workers", "router", "planes", "process", "cyclopts", "structlog", "uvloop", "json")


@pytest.fixture
def folder(tmp_path):
    """Somebody else's project."""
    place = tmp_path / "project"
    for name in NAMES:
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text('open("ran", "a").write(__name__)\nraise SystemExit(__file__)\n')
        (place / name / "__main__.py").write_text('open("ran", "a").write(__name__)\n')
    return place


async def headrace(folder, *argv):
    process = await asyncio.create_subprocess_exec(
        HEADRACE, *argv, stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=subprocess.STDOUT, cwd=folder
    )
    output, _ = await process.communicate()
    assert not (folder / "ran").exists(), output.decode()
    return process.returncode, output.decode()


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--version"], 0, "."),
        (["--help"], 0, "gateway"),
        *((["up", "--help"], 0, "--prefill"), (["up", "--engine", "no"], 2, "--engine")),
        *((["gateway", "--help"], 0, "--queue-limit"), (["gateway", "--port", "-1"], 2, "--port is -1")),
        *((["worker", "--help"], 0, "--role"), (["worker", "--port", "-1"], 2, "--port is -1")),
        (["fleet", "--etcd", "http://127.0.0.1:9", "--timeout-s", "0.1"], 2, "etcd"),
        (["config", "--etcd", "http://127.0.0.1:9"], 2, "etcd"),
        (["etcd", "--help"], 0, "--data-dir"),
        (["etcd", "--port", "-1"], 2, "-1"),
        (["nats", "--help"], 0, "--data-dir"),
        (["nats", "--port", "-1"], 2, "-1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
async def test_a_command_runs_what_is_installed(folder, argv, status, words):
    ended, output = await headrace(folder, *argv)
    assert ended == status, output
    assert words in output


@pytest.mark.parametrize("command", ["etcd", "nats"])
async def test_a_server_runs_what_is_installed(folder, until, command):
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(HEADRACE, command, "--port", str(port), "--data-dir", str(folder / "data")),
        stdout=-3, stderr=-3, cwd=folder, env=os.environ | {"ETCD_LISTEN_METRICS_URLS": "no url", "ETCD_NAME": ""},
    )  # fmt: skip

    async def answers():
        assert process.returncode is None
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await until(answers, f"{command} on port {port}")
    finally:
        process.terminate()
        await process.wait()
    assert not (folder / "ran").exists()


async def test_up_and_all_that_it_starts_run_what_is_installed(folder, until, tmp_path):
    output = tmp_path / "output"
    flags = ("--engine", "sim", "--state-dir", str(tmp_path / "state"))
    environment = {"HEADRACE_SPEEDUP": "10", "HEADRACE_CACHE_DIR": str(tmp_path / "assets"), "HEADRACE_PROT": "1"}
    process = start_up(free_port(), output, *flags, env=environment, argv=[HEADRACE], cwd=folder)

    async def is_ready():
        assert process.poll() is None, output.read_text()
        return "Headrace listens on" in output.read_text()

    try:
        await until(is_ready, "headrace up")
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)
    assert not (folder / "ran").exists()
    assert output.read_text().count("HEADRACE_PROT names no setting; the nearest is HEADRACE_PORT") == 1
    assert "names no setting" not in (tmp_path / "state" / "gateway.log").read_text()
