"""`headrace up` and the rest of the command line, as somebody at a terminal meets them."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from loadtest.processes import free_port
from tests.integration.conftest import PATIENCE_S
from tests.up import ROOT, start_up

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def processes():
    """pid → (parent, instant of its start, command line) of all that run; zombies do not."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(folder.name)] = (int(fields[1]), fields[19], command)
    return found


class Up:
    """`headrace up --engine sim` on a free port, with a session of its own like one in a terminal."""

    def __init__(self, folder, *flags, state=None, env=None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.output = folder / "output"
        flags = ("--engine", "sim", "--state-dir", str(state or folder / "state"), *flags)
        environment = {"HEADRACE_SPEEDUP": "10", "HEADRACE_CACHE_DIR": str(folder / "assets"), **(env or {})}
        self.process = start_up(self.port, self.output, *flags, env=environment)
        self.seen = {}

    @property
    def text(self):
        return self.output.read_text()

    def descendants(self):
        """All that it has started, and what that has started; remembered, as orphans lose their parent."""
        everything, family = processes(), {self.process.pid}
        while more := {pid for pid, (parent, *_) in everything.items() if parent in family} - family:
            family |= more
        self.seen |= {pid: everything[pid] for pid in family - {self.process.pid}}
        return {pid: everything[pid] for pid in family - {self.process.pid}}

    def orphans(self):
        everything = processes()
        return [entry for pid, entry in self.seen.items() if pid in everything and everything[pid][1] == entry[1]]

    def pid_of(self, words):
        return next(pid for pid, (*_, command) in self.descendants().items() if words in command)

    async def listens(self, until):
        def is_listening():
            assert self.process.poll() is None, self.text
            return "curl -N" in self.text and self.text.endswith("'\n\n")

        await until(is_listening, f"it listens: {self.output}")
        self.descendants()

    async def is_over(self, until):
        await until(lambda: self.process.poll() is not None, f"it ends: {self.output}")
        await until(lambda: not self.orphans(), f"no orphan is left: {self.output}")
        return self.process.returncode

    def close(self):
        self.descendants()
        for pid in (self.process.pid, *self.seen):
            if pid == self.process.pid or any(pid == p and e in self.orphans() for p, e in self.seen.items()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self.process.wait()


@pytest.fixture
def up(tmp_path):
    started = []

    def start(*flags, **options):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Up(folder, *flags, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="the printed line needs curl")
async def test_the_printed_line_works_and_ctrl_c_stops_everything(up, until):
    running = up()
    await running.listens(until)
    assert f"Headrace listens on {running.url}\n" in running.text
    assert len(running.seen) == 5, "etcd, NATS, two workers and a gateway"
    exports = next(line for line in running.text.splitlines() if "export HEADRACE_ETCD" in line)
    status, table, _ = await headrace("fleet", env=dict(re.findall(r"(HEADRACE_\w+)=(\S+)", exports)))
    assert status == 0
    assert {"prefill-1", "decode-1"} <= set(table.split()), table
    curl = running.text[running.text.index("curl -N") :]
    shell = await asyncio.create_subprocess_exec("sh", "-c", curl, stdout=-1, stderr=subprocess.DEVNULL)
    output, _ = await shell.communicate()
    events = [line.removeprefix("data: ") for line in output.decode().splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        metrics = (await client.get("/metrics")).text
    (handed,) = [line for line in metrics.splitlines() if line.startswith("headrace_handover_bytes_total{")]
    assert float(handed.split()[-1]) > 0
    running.process.send_signal(signal.SIGINT)
    assert await running.is_over(until) == 0
    assert running.text.rstrip().endswith("stopped")


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_an_ipv6_address_with_keys_and_a_policy(up, until, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-1"\n')
    running = up("--host", "::", "--policy", "least_loaded", env={"HEADRACE_API_KEYS_FILE": str(keys)})
    await running.listens(until)
    url = f"http://[::1]:{running.port}"
    assert f"curl -N {url}/v1/chat/completions" in running.text
    assert "-H 'authorization: Bearer YOUR_KEY'" in running.text
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, headers={"authorization": "Bearer sk-1"}) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.headers["x-headrace-policy"]) == (200, "least_loaded")


async def test_keys_in_etcd_and_a_port_for_operators(up, until):
    port = free_port()
    operators = f"http://127.0.0.1:{port}"
    flags = ("--prefill", "0", "--api-keys", "--admin-port", str(port))
    running = up(*flags, env={"HEADRACE_CONSOLE": "false"})
    await running.listens(until)
    assert "/console\n" not in running.text
    exports = dict(re.findall(r"(HEADRACE_\w+)=(\S+)", running.text))
    status, told, errors = await headrace("keys", "create", "search", env=exports)
    assert status == 0, errors
    (secret,) = re.findall(r"\bsk-\S+", told)
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 401
        key = {"authorization": f"Bearer {secret}"}

        async def is_known():
            return (await client.post("/v1/chat/completions", json=body, headers=key)).status_code == 200

        await until(is_known)
    for command in (("top", "--every-s", "0.2"), ("doctor",)):
        status, told, errors = await headrace(*command, "--url", operators, env=exports)
        assert status == 0, told + errors
        assert "decode-1" in told
    async with httpx.AsyncClient(base_url=operators, timeout=PATIENCE_S) as client:
        assert (await client.get("/console")).status_code == 404


async def test_streams_may_finish_unless_ctrl_c_comes_twice(up, until):
    running = up("--prefill", "0", env={"HEADRACE_SPEEDUP": "1"})
    await running.listens(until)
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        async with client.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 300}) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            running.process.send_signal(signal.SIGINT)
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert await running.is_over(until) == 0

        running = up("--prefill", "0", env={"HEADRACE_SPEEDUP": "1"})
        await running.listens(until)
        url = f"{running.url}/v1/chat/completions"
        async with client.stream("POST", url, json=body | {"max_tokens": 30_000}) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            running.process.send_signal(signal.SIGINT)
            await until(lambda: "stopping" in running.text)
            assert await anext(lines) is not None, "the stream goes on"
            running.process.send_signal(signal.SIGINT)
            assert await running.is_over(until) == 0


async def test_nothing_survives_a_killed_supervisor(up, until):
    running = up()
    await running.listens(until)
    running.process.kill()
    await running.is_over(until)


async def test_ctrl_c_during_the_start_leaves_nothing_behind(up, until):
    running = up()
    await until(lambda: "nats is ready" in running.text)
    await until(lambda: len(running.descendants()) >= 3)
    running.process.send_signal(signal.SIGINT)
    assert await running.is_over(until) == 0
    assert "curl" not in running.text


async def test_what_dies_is_started_again(up, until):
    running = up("--decode", "2")
    await running.listens(until)
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:

        async def epochs():
            workers = (await client.get("/v1/fleet")).json()["workers"]
            return {worker["worker"]: worker["epoch"] for worker in workers if worker["is_connected"]}

        before = await epochs()
        assert set(before) == {"prefill-1", "decode-1", "decode-2"}
        os.kill(running.pid_of("--worker-id decode-1"), signal.SIGKILL)
        body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200

        async def is_back():
            now = await epochs()
            return set(now) == set(before) and now["decode-1"] > before["decode-1"]

        await until(is_back)
        os.kill(running.pid_of("app.cli gateway"), signal.SIGKILL)

        async def serves_again():
            try:
                return (await client.post("/v1/chat/completions", json=body)).status_code == 200
            except httpx.TransportError:
                return False

        await until(serves_again)
    assert "decode-1 was killed by SIGKILL" in running.text
    running.process.send_signal(signal.SIGTERM)
    assert await running.is_over(until) == 0


async def test_etcd_and_nats_are_started_again_and_take_new_workers(up, until):
    running = up()
    await running.listens(until)
    os.kill(running.pid_of("/etcd "), signal.SIGKILL)
    os.kill(running.pid_of("/nats-server "), signal.SIGKILL)
    for name in ("etcd", "nats"):
        await until(lambda name=name: f"{name} is ready again" in running.text, f"{name} is back: {running.output}")
        assert f"{name} was killed by SIGKILL" in running.text
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        os.kill(running.pid_of("--worker-id decode-1"), signal.SIGKILL)
        await until(lambda: "decode-1 was killed" in running.text)
        body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}

        async def serves_again():
            return (await client.post("/v1/chat/completions", json=body)).status_code == 200

        await until(serves_again)
    running.process.send_signal(signal.SIGTERM)
    assert await running.is_over(until) == 0


async def test_settings_may_come_from_the_environment(up, until, stack):
    variables = {
        "HEADRACE_ETCD": stack.site.etcd,
        "HEADRACE_NATS": stack.site.nats,
        "HEADRACE_NAMESPACE": f"{stack.site.namespace}-up",
        "HEADRACE_PREFILL": "0",
        "HEADRACE_DECODE": "0",
        "HEADRACE_BOTH": "2",
        "HEADRACE_SERVED_MODEL_NAME": "mill",
        "HEADRACE_LOG_LEVEL": "warning",
        "HEADRACE_LOG_JSON": "true",
        "HEADRACE_BLOCK_SIZE": "8",
    }
    running = up(env=variables)
    await running.listens(until)
    assert len(running.seen) == 3, "two workers and a gateway"
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["mill"]
        workers = (await client.get("/v1/fleet")).json()["workers"]
    assert {(worker["role"], worker["facts"]["block_size"]) for worker in workers} == {("both", 8)}
    running.process.send_signal(signal.SIGINT)
    assert await running.is_over(until) == 0


async def headrace(*argv, env=None):
    """Exit status, standard output and standard error of a command that ends by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app.cli", *argv, stdout=-1, stderr=-1, cwd=ROOT, env=os.environ | (env or {})
    )
    try:
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode(), errors.decode()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["up", "--model", "/nowhere"], ["--model", "/nowhere", "config.json"]),
        (["up", "--engine", "sim", "--model", "/nowhere"], ["--model", "/nowhere", "tokenizer.json"]),
        (["up", "--engine", "sin"], ["--engine", "sin", "sim"]),
        (["up", "--engine", "sim", "--decode", "-1"], ["--decode", "-1", "0 or more"]),
        (["up", "--engine", "sim", "--decode", "0"], ["--decode", "at least one"]),
        (["up", "--engine", "sim", "--decode", "many"], ["--decode", "many"]),
        (["up", "--engine", "sim", "--prefil", "2"], ["--prefil"]),
        (["up", "--engine", "sim", "--port", "70000"], ["--port", "70000", "65535"]),
        (["worker", "--engine", "sim", "--role", "boss"], ["--role", "boss", "prefill"]),
        (["worker", "--engine", "vllm", "--model", "/nowhere"], ["--model", "/nowhere"]),
        (["worker", "--engine", "sim", "--speedup", "0"], ["--speedup", "0", "more than 0"]),
        (["worker", "--engine", "sim", "--speedupp", "2"], ["--speedupp"]),
        (["gateway", "--policy", "no-such"], ["--policy", "no-such", "round_robin"]),
        (["gateway", "--api-keys-file", "/nowhere"], ["--api-keys-file", "/nowhere"]),
        (["gateway", "--etcd", "ftp://x"], ["--etcd", "ftp://x"]),
        (["gateway", "--nats", "what"], ["--nats", "what"]),
        (["gateway", "--prot", "1"], ["--prot"]),
        (["fleet", "--etcd", "http://127.0.0.1:9", "--timeout-s", "0.3"], ["127.0.0.1:9", "0.3 s"]),
        (["up", "--engine", "sim", "--etcd", "ftp://x"], ["--etcd", "ftp://x"]),
        (["up", "--engine", "sim", "--nats", "what"], ["--nats", "what"]),
        (["up", "--engine", "sim", "--namespace", "a b"], ["--namespace", "a b"]),
        (["fleet", "--etcd", "ftp://x"], ["--etcd", "ftp://x"]),
        (["fleet", "--nats", "what"], ["--nats", "what"]),
        (["fleet", "--namespace", "a b"], ["--namespace", "a b"]),
        (["dance"], ["dance"]),
    ],
    ids=" ".join,
)
async def test_what_cannot_start_says_why_in_one_line(argv, words):
    status, output, errors = await headrace(*argv)
    assert status == 2, errors
    assert output == ""
    assert errors.count("\n") == 1, errors
    assert all(word in errors for word in words), errors


@pytest.mark.parametrize("command", ["up", "gateway", "worker", "etcd", "nats"])
async def test_a_taken_port_is_said_in_one_line(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = {"up": ["--engine", "sim"], "worker": ["--engine", "sim"]}.get(command, [])
        status, _, errors = await headrace(command, "--port", port, *flags)
    assert status == 2, errors
    said = [line for line in errors.splitlines() if "event=worker.progress" not in line]
    assert len(said) == 1, errors
    assert port in said[0]


async def test_a_state_directory_that_is_somebody_s_is_left_alone(up, until, tmp_path):
    state = tmp_path / "theirs"
    (state / "etcd").mkdir(parents=True)
    (state / "etcd" / "data").write_text("precious")
    running = up(state=state)
    assert await running.is_over(until) == 2
    assert f"{state / 'etcd'} is not headrace's and would be lost" in running.text
    assert (state / "etcd" / "data").read_text() == "precious"
    first = up()
    await first.listens(until)
    second = up(state=first.folder / "state")
    assert await second.is_over(until) == 2
    assert "another headrace up runs in it" in second.text


async def test_a_worker_that_cannot_start_ends_everything_with_its_own_reason(up, until):
    running = up("--decode", "2", env={"HEADRACE_NUM_BLOCKS": "1"})
    assert await running.is_over(until) == 2
    last = running.text.splitlines()[-1]
    assert last.startswith("headrace: ")
    assert "num_blocks" in last


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["up", "gateway", "worker", "etcd", "nats", "fleet", "--etcd as HEADRACE_ETCD"]),
        (["up", "--help"], ["--engine", "--prefill", "--handover", "[env var: HEADRACE_PORT]"]),
        (["gateway", "--help"], ["--policy", "--api-keys-file", "Routing policy"]),
        (["worker", "--help"], ["--role", "--speedup", "--block-size", "HEADRACE_SPEEDUP"]),
        (["etcd", "--help"], ["--data-dir"]),
        (["nats", "--help"], ["--data-dir"]),
        (["fleet", "--help"], ["--once", "--namespace"]),
        (["config", "--help"], ["NAME=VALUE", "policy", "slo_ttft_s", "--clear", "aging (4.0): Seconds of predicted"]),
        (["--version"], ["."]),
    ],
    ids=lambda value: value[0],
)
async def test_help_is_complete(argv, words):
    status, output, errors = await headrace(*argv, env={"COLUMNS": "200"})
    assert (status, errors) == (0, "")
    assert all(word in output for word in words), output


async def test_etcd_and_nats_run_in_the_foreground_until_sigterm(until, tmp_path):
    for command, scheme in (("etcd", "http"), ("nats", "nats")):
        port = free_port()
        data = ["--data-dir", str(tmp_path / command)]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app.cli", command, "--port", str(port), *data),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip

        async def answers(port=port, process=process):
            assert process.returncode is None
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            await writer.wait_closed()
            return True

        await until(answers, f"{command} at {scheme}://127.0.0.1:{port}")
        process.terminate()
        await process.wait()


async def test_secure_needs_no_more_than_saying_so(up, until):
    running = up("--secure")
    await running.listens(until)
    command = next(line.strip() for line in running.text.splitlines() if "curl -N" in line)
    assert f"--cacert {running.folder / 'state' / 'certs' / 'ca.pem'} https://127.0.0.1:{running.port}/" in command
    certs = ssl.create_default_context(cafile=running.folder / "state" / "certs" / "ca.pem")
    body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    async with httpx.AsyncClient(verify=certs, timeout=PATIENCE_S) as client:
        answer = await client.post(f"https://127.0.0.1:{running.port}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    exported = next(line for line in running.text.splitlines() if "export HEADRACE_ETCD=https://" in line)
    status, table, _ = await headrace("fleet", env=dict(re.findall(r"(HEADRACE_\w+)=(\S+)", exported)))
    assert status == 0
    assert "decode-1" in table
    command_lines = " ".join(line for *_, line in running.descendants().values())
    assert (running.folder / "state" / "certs" / "stream-token").read_text().strip() not in running.text + command_lines
