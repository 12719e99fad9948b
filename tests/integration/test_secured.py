"""A fleet with everything on: TLS and logins at etcd and NATS, mutual TLS and a token on the streams, HTTPS.

On each port of each process somebody tries who lacks something.
"""

import asyncio
import contextlib
import json
import os
import shlex
import ssl

import httpx
import pytest
import pytest_asyncio
from aetcd import rpc

from app.cli.certs import CertsSettings, make_certs
from app.cli.servers import etcd_server, free_port, nats_argv
from planes.control import ControlPlaneUnavailable, Etcd, get_workers, put_config
from planes.events import EventPlane, EventPlaneUnavailable
from planes.security.planes import EtcdSecurity, NatsSecurity, StreamSecurity
from planes.security.tls import TlsFiles
from planes.streams.client import WorkerConnection, WorkerUnreachable
from planes.streams.greeting import StreamKeys
from tests.integration.conftest import PATIENCE_S, Gateway, Process, Site, poll_until
from tests.streams import REQUEST, frame

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PASSWORD = "s3cr3t of the mill"
SCRAPER = "what Prometheus shows"
PROMPT = "a prompt that is nobody else's: mills and rivers"


class Fleet:
    """Where everything is, and what its members have."""

    def __init__(self, site, certs, folder):
        self.site, self.certs, self.folder = site, certs, folder
        self.gateway = Gateway(None)
        self.members = StreamKeys(StreamSecurity(TlsFiles(certs.ca, *certs.plane), certs.token))
        self.etcd_security = EtcdSecurity(TlsFiles(certs.ca, *certs.plane), "root", folder / "password")
        self.nats_security = NatsSecurity(TlsFiles(certs.ca, *certs.plane), "mill", folder / "password")

    @property
    def environment(self):
        files = {f"HEADRACE_{name.upper()}": path for name, path in self.certs.flags.items()}
        return (
            dict(os.environ)
            | files
            | {
                "HEADRACE_ETCD_USER": "root",
                "HEADRACE_ETCD_PASSWORD_FILE": str(self.folder / "password"),
                "HEADRACE_NATS_USER": "mill",
                "HEADRACE_NATS_PASSWORD_FILE": str(self.folder / "password"),
                "HEADRACE_METRICS_PORT": "0",
                "HEADRACE_METRICS_TOKEN_FILE": str(self.folder / "scraper"),
            }
        )

    def start(self, name, *argv, without=(), **changed):
        environment = {key: value for key, value in (self.environment | changed).items() if key not in without}
        return self.site.start(name, [*argv, *self.site.flags, "--log-level", "debug"], environment)

    def start_worker(self, name, **kwargs):
        own = ["--role", name.partition("-")[0], "--worker-id", name, "--engine", "sim", "--speedup", "10"]
        return self.start(name, "workers", *own, **kwargs)

    def start_gateway(self, *flags, **kwargs):
        own = ["--port", "0", "--policy", "round_robin", "--cache-dir", str(self.folder / "assets"), *flags]
        return self.start("gateway", "app.cli", "gateway", *own, **kwargs)

    async def workers(self):
        return await get_workers(Etcd(self.site.etcd, security=self.etcd_security), self.site.namespace)

    @contextlib.asynccontextmanager
    async def api(self, verify=True):
        context = ssl.create_default_context(cafile=self.certs.ca)
        async with httpx.AsyncClient(base_url=self.gateway.url, verify=context, timeout=PATIENCE_S) as client:
            yield client

    def logs(self):
        return "".join(file.read_text(errors="replace") for file in self.site.logs.glob("*.log"))


async def grant(url, security):
    """Make etcd ask for a user and a password."""
    async with Etcd(url, security=EtcdSecurity(security.tls)).session() as client:
        stub = rpc.AuthStub(client.channel)
        await stub.UserAdd(rpc.AuthUserAddRequest(name="root", password=PASSWORD))
        await stub.RoleAdd(rpc.AuthRoleAddRequest(name="root"))
        await stub.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
        await stub.AuthEnable(rpc.AuthEnableRequest())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secured")
    logs = folder / "logs"
    logs.mkdir()
    certs = make_certs(folder / "certs", CertsSettings())
    (folder / "password").write_text(PASSWORD + "\n")
    (folder / "scraper").write_text(SCRAPER + "\n")
    port = free_port("nats", 0)
    settings = folder / "nats.conf"
    settings.write_text(f'authorization {{ user: mill, password: "{PASSWORD}" }}\n')
    argv = [*nats_argv(folder / "nats", port, certs=certs), f"--config={settings}"]
    async with etcd_server(folder / "etcd", certs=certs) as etcd:
        nats = Process("nats", argv, folder / "nats.log")
        site = Site(etcd.url, f"tls://127.0.0.1:{port}", logs)
        own = Fleet(site, certs, folder)
        try:
            await grant(etcd.url, own.etcd_security)
            for name in ("prefill-1", "decode-1"):
                own.start_worker(name)
            cert, key = certs.server
            own.gateway = Gateway(own.start_gateway("--tls-cert", str(cert), "--tls-key", str(key)))
            line = await own.gateway.process.says("event=gateway.listening")
            own.gateway.url = "https://localhost:" + next(
                w for w in line.split() if w.startswith("port=")
            ).removeprefix("port=")
            async with own.api() as api:

                async def is_connected():
                    return (await api.get("/health")).json()["workers"] == 2

                await poll_until(is_connected)
            yield own
        finally:
            site.close()
            nats.kill()


def body(**fields):
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": "sim", "messages": messages, "max_tokens": 24, "ignore_eos": True, **fields}


async def test_a_streamed_answer_is_handed_over_between_two_workers(fleet):
    async with fleet.api() as api:
        whole = await api.post("/v1/chat/completions", json=body(), headers={"x-headrace-handover": "always"})
        assert whole.status_code == 200, whole.text
        assert (whole.headers["x-headrace-prefill"], whole.headers["x-headrace-decode"]) == ("prefill-1", "decode-1")
        text = ""
        async with api.stream("POST", "/v1/chat/completions", json=body(stream=True)) as streamed:
            async for line in streamed.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
        assert text == whole.json()["choices"][0]["message"]["content"]
        assert len(text) == 24


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fleet", "--once"), "decode-1"),
        (("config", "policy=dynamo"), ""),
        (("role", "decode-1", "decode"), ""),
        (("keys", "list"), ""),
        (("doctor",), "connected to 2 of 2 workers"),
    ],
)
async def test_commands_have_the_same_flags(fleet, arguments, told):
    where = {"COLUMNS": "300", "HEADRACE_URL": fleet.gateway.url, "SSL_CERT_FILE": str(fleet.certs.ca)}
    process = fleet.site.start("command", ["app.cli", *arguments, *fleet.site.flags], fleet.environment | where)
    assert await process.ended() == 0, process.log.read_text()
    assert told in process.log.read_text()


@pytest.mark.parametrize("command", ["top", "trace"])
async def test_commands_that_ask_the_gateway_take_its_certificate_s_ca(fleet, command):
    where = {"HEADRACE_URL": fleet.gateway.url}
    believing = fleet.site.start(
        "command", ["app.cli", command], fleet.environment | where | {"SSL_CERT_FILE": str(fleet.certs.ca)}
    )
    assert await believing.ended() == 0, believing.log.read_text()
    doubting = fleet.site.start("command", ["app.cli", command], fleet.environment | where)
    assert await doubting.ended() == 2
    assert doubting.said("certificate verify failed")


@pytest.mark.parametrize(
    "security",
    [
        pytest.param(lambda fleet, _: EtcdSecurity(), id="no CA"),
        pytest.param(
            lambda fleet, _: EtcdSecurity(TlsFiles(fleet.certs.ca), "root", fleet.folder / "password"),
            id="no certificate",
        ),
        pytest.param(
            lambda fleet, strangers: EtcdSecurity(
                TlsFiles(fleet.certs.ca, *strangers.plane), "root", fleet.folder / "password"
            ),
            id="another CA's",
        ),
        pytest.param(lambda fleet, _: EtcdSecurity(TlsFiles(fleet.certs.ca, *fleet.certs.plane)), id="no user"),
        pytest.param(
            lambda fleet, _: EtcdSecurity(TlsFiles(fleet.certs.ca, *fleet.certs.plane), "root", fleet.certs.token),
            id="wrong password",
        ),
    ],
)
async def test_etcd_tells_and_takes_nothing(fleet, strangers, security):
    etcd = Etcd(fleet.site.etcd, security=security(fleet, strangers))
    with pytest.raises(ControlPlaneUnavailable) as refused:
        await get_workers(etcd, fleet.site.namespace)
    with pytest.raises(ControlPlaneUnavailable):
        await put_config(etcd, fleet.site.namespace, b"{}")
    assert PASSWORD not in str(refused.value)


async def test_etcd_without_tls_is_not_spoken_to(fleet):
    etcd = Etcd(fleet.site.etcd.replace("https", "http"), timeout_s=2.0)
    with pytest.raises(ControlPlaneUnavailable):
        await get_workers(etcd, fleet.site.namespace)


@pytest.mark.parametrize(
    "security",
    [
        pytest.param(lambda fleet, _: NatsSecurity(user="mill", password_file=fleet.folder / "password"), id="no CA"),
        pytest.param(
            lambda fleet, _: NatsSecurity(TlsFiles(fleet.certs.ca), "mill", fleet.folder / "password"),
            id="no certificate",
        ),
        pytest.param(
            lambda fleet, strangers: NatsSecurity(
                TlsFiles(fleet.certs.ca, *strangers.plane), "mill", fleet.folder / "password"
            ),
            id="another CA's",
        ),
        pytest.param(lambda fleet, _: NatsSecurity(TlsFiles(fleet.certs.ca, *fleet.certs.plane)), id="no user"),
        pytest.param(
            lambda fleet, _: NatsSecurity(TlsFiles(fleet.certs.ca, *fleet.certs.plane), "mill", fleet.certs.token),
            id="wrong password",
        ),
    ],
)
async def test_nats_lets_nobody_in(fleet, strangers, security):
    heard = []
    plane = EventPlane(fleet.site.nats, fleet.site.namespace, security=security(fleet, strangers))

    async def failed(exc):
        heard.append(exc)

    plane._failed = failed
    running = asyncio.create_task(plane.run())
    try:
        await poll_until(lambda: len(heard) > 1)
        assert not plane.is_connected
        with pytest.raises(EventPlaneUnavailable):
            await plane.send("headrace")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("name", ["prefill-1", "decode-1"])
@pytest.mark.parametrize("way", ["nothing", "no certificate", "another CA's", "no token", "another token"])
async def test_a_worker_s_port_takes_no_request(fleet, strangers, name, way):
    entry = (await fleet.workers())[name]
    own = TlsFiles(fleet.certs.ca, *fleet.certs.plane)
    keys = {
        "nothing": None,
        "no certificate": StreamKeys(StreamSecurity(token_file=fleet.certs.token)),
        "another CA's": StreamKeys(StreamSecurity(TlsFiles(strangers.ca, *strangers.plane), fleet.certs.token)),
        "no token": StreamKeys(StreamSecurity(own)),
        "another token": StreamKeys(StreamSecurity(own, strangers.token)),
    }[way]
    with pytest.raises(WorkerUnreachable):
        await WorkerConnection.open(entry.worker, entry.epoch, entry.address, timeout_s=30.0, keys=keys)
    host, _, port = entry.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(frame(REQUEST) * 10)
    with contextlib.suppress(ConnectionError):
        assert name.encode() not in await reader.read()
    writer.close()
    connection = await WorkerConnection.open(
        entry.worker, entry.epoch, entry.address, timeout_s=30.0, keys=fleet.members
    )
    connection.close()
    await connection.closed


@pytest.mark.parametrize(
    "missing",
    [
        ("HEADRACE_PLANE_CERT", "HEADRACE_PLANE_KEY"),
        ("HEADRACE_ETCD_USER", "HEADRACE_ETCD_PASSWORD_FILE"),
        ("HEADRACE_PLANE_CA", "HEADRACE_PLANE_CERT", "HEADRACE_PLANE_KEY"),
    ],
)
async def test_a_worker_that_lacks_something_is_not_registered(fleet, missing):
    process = fleet.start_worker("decode-9", without=missing)
    await process.says("event=etcd.unavailable")
    assert set(await fleet.workers()) == {"prefill-1", "decode-1"}
    process.kill()


async def test_a_registered_worker_that_does_not_know_the_token_gets_no_prompt(fleet):
    process = fleet.start_worker("decode-8", without=("HEADRACE_STREAM_TOKEN_FILE",))
    try:
        await process.says("event=worker.ready")
        await fleet.gateway.process.says("knows the fleet's token")
        async with fleet.api() as api:
            workers = {each["worker"]: each for each in (await api.get("/v1/fleet")).json()["workers"]}
            assert not workers.get("decode-8", {}).get("is_connected", False)
            for _ in range(4):
                answer = await api.post("/v1/chat/completions", json=body())
                assert answer.headers["x-headrace-decode"] == "decode-1"
    finally:
        process.kill()


async def test_https_is_not_http_and_its_certificate_is_checked(fleet):
    plain = fleet.gateway.url.replace("https", "http")
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"{plain}/health")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.get(f"{fleet.gateway.url}/health")


def port_in(line, name="port"):
    return next(word for word in line.split() if word.startswith(f"{name}=")).removeprefix(f"{name}=")


@pytest.mark.parametrize("name", ["prefill-1", "decode-1"])
async def test_a_worker_s_metrics_are_read_with_their_token_alone(fleet, name):
    worker = next(each for each in fleet.site.processes if each.name == name)
    port = port_in(await worker.says("event=metrics.listening"))
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://localhost:{port}/metrics")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.get(f"https://localhost:{port}/metrics")
    context = ssl.create_default_context(cafile=fleet.certs.ca)
    async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=context, timeout=20) as client:
        for shown in (None, "Bearer", "Bearer another", f"Bearer {fleet.certs.token.read_text().strip()}", SCRAPER):
            refused = await client.get("/metrics", headers={} if shown is None else {"authorization": shown})
            assert (refused.status_code, refused.text) == (401, ""), shown
        told = await client.get("/metrics", headers={"authorization": f"Bearer {SCRAPER}"})
        assert told.status_code == 200
        assert f'worker="{name}"' in told.text
        assert (await client.get("/live")).status_code == 200


async def test_a_port_for_operators_that_others_reach_has_tls_and_asks_for_an_admin_s_key(fleet, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text(
        '[[keys]]\ntenant = "t"\nkey = "sk-plain"\n[[keys]]\ntenant = "o"\nkey = "sk-admin"\nadmin = true\n'
    )
    cert, key = fleet.certs.server
    tls = ("--tls-cert", str(cert), "--tls-key", str(key))
    own = ("--admin-port", "0", "--admin-host", "0.0.0.0", "--api-keys-file", str(keys))
    process = fleet.start_gateway(*tls, *own)
    try:
        port = port_in(await process.says("event=gateway.admin_listening"), "at")
        main = port_in(await process.says("event=gateway.listening"))
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://localhost:{port}/metrics")
        context = ssl.create_default_context(cafile=fleet.certs.ca)
        async with httpx.AsyncClient(verify=context, timeout=20) as client:
            for path in ("/metrics", "/v1/fleet", "/v1/usage", "/v1/routes", "/console/state"):
                asked = [
                    (await client.get(f"https://localhost:{port}{path}", headers=headers)).status_code
                    for headers in ({}, {"authorization": "Bearer sk-plain"})
                ]
                assert asked == [401, 403], path
            admin = {"authorization": "Bearer sk-admin"}
            assert (await client.get(f"https://localhost:{port}/metrics", headers=admin)).status_code == 200
            assert (await client.get(f"https://localhost:{main}/metrics", headers=admin)).status_code == 404
    finally:
        process.kill()


async def test_a_process_that_would_be_open_to_others_does_not_start(fleet):
    nothing = ("HEADRACE_PLANE_CA", "HEADRACE_PLANE_CERT", "HEADRACE_PLANE_KEY", "HEADRACE_STREAM_TOKEN_FILE")
    public = {"HEADRACE_HOST": "0.0.0.0", "HEADRACE_ADVERTISE_HOST": "here"}
    for process, said in (
        (fleet.start_gateway("--host", "0.0.0.0"), "without a key"),
        (
            fleet.start_worker("decode-7", without=nothing, **public),
            "taken for a gateway",
        ),
    ):
        assert await process.ended() == 2
        assert said in process.log.read_text()
        assert "--insecure" in process.log.read_text()


async def test_no_secret_is_in_a_log_or_on_a_command_line(fleet):
    secrets = [PASSWORD, SCRAPER, fleet.certs.token.read_text().strip(), PROMPT]
    told = fleet.logs() + (fleet.folder / "etcd.log").read_text() + (fleet.folder / "nats.log").read_text()
    assert len(told) > 1000
    assert [secret for secret in secrets if secret in told] == []
    commands = "".join(shlex.join(process.popen.args) for process in fleet.site.processes)
    assert [secret for secret in secrets if secret in commands] == []


async def test_nats_is_found_again_when_the_right_ca_comes(fleet, strangers, tmp_path):
    """After a handshake that failed nats-py itself would wait forever."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(strangers.ca.read_bytes())
    security = NatsSecurity(TlsFiles(ca, *fleet.certs.plane), "mill", fleet.folder / "password")
    plane = EventPlane(fleet.site.nats, fleet.site.namespace, security=security)
    heard = []

    async def failed(exc):
        heard.append(exc)

    plane._failed = failed
    running = asyncio.create_task(plane.run())
    try:
        await poll_until(lambda: heard)
        ca.write_bytes(fleet.certs.ca.read_bytes())
        await poll_until(lambda: plane.is_connected)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
