import asyncio
import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import structlog
from starlette.applications import Starlette

from app.auth import ApiKeys
from app.fleet.adapters import Adapters
from app.fleet.connections import WorkerConnections
from app.fleet.peers import PeerNews
from app.fleet.routing_config import RoutingConfig, RoutingConfigFollower, routing_setup
from app.gateway import Gateway
from app.http.body import BodyMemory
from app.http.leaving import Departure
from app.keys.ledger import Ledger
from app.keys.usage import UsageBook
from app.main import _log_start, create_app, request_ids, streams_first
from app.metrics import Metrics, router_gauges
from app.prompt.catalog import Models
from app.prompt.prepare import Preprocessor
from app.responses.background import Background
from app.responses.store import ResponseStore
from app.serving.binding import Dispatcher
from app.serving.relay import Relay
from app.serving.retries import ExchangeLimits
from app.settings import GatewaySettings
from planes.control import Etcd
from planes.entries import Entries
from planes.wire.errors import UnusableSetting
from planes.wire.messages import RequestId
from router.errors import NoWorker
from router.request import RoutableRequest
from router.router import Router
from router.timeline import Timeline
from tests.fakes import FakeNewsPlane, FakeValues, registration
from tests.raw_http import read_head


class NoStore:
    async def has(self, name):
        return False

    async def put(self, name, data): ...

    async def get(self, name):
        raise AssertionError


class Still:
    """A connection that nothing happens on."""

    num_streams = num_bytes_received = num_bytes_sent = 0

    def __init__(self):
        self.closed = asyncio.get_running_loop().create_future()

    def close(self): ...


async def connect(worker):
    return Still()


async def load(worker): ...


@pytest.fixture
def settings(tmp_path):
    return GatewaySettings(cache_dir=tmp_path)


@pytest.fixture
async def gateway(settings, tmp_path):
    clock = time.monotonic
    start = routing_setup(settings, RoutingConfig())
    router, metrics = Router(start.settings, start.policy), Metrics()
    dispatcher, models = Dispatcher(router, clock=clock), Models(NoStore(), tmp_path)
    models.load = load
    fleet = WorkerConnections(router, dispatcher, models, models, connect=connect, clock=clock, rng=random.Random(0))
    relay = Relay(dispatcher, fleet, metrics, clock=clock, limits=ExchangeLimits(replacement_s=0.0))
    metrics.watch(fleet.gauges)
    metrics.watch(lambda: router_gauges(router.stats(now=clock())))
    preprocessor = Preprocessor()
    responses = ResponseStore(FakeValues())
    yield Gateway(
        settings=settings,
        keys=ApiKeys(),
        ledger=Ledger(Entries(Etcd(settings.etcd), "n", "budgets"), gateway="g", wall_clock=time.time),
        usage=UsageBook(Entries(Etcd(settings.etcd), "n", "usage"), gateway="g", wall_clock=time.time),
        models=models,
        preprocessor=preprocessor,
        bodies=BodyMemory(1 << 20),
        router=router,
        routing_config=RoutingConfigFollower(settings, start, lambda changed: None),
        dispatcher=dispatcher,
        fleet=fleet,
        peers=PeerNews(router, dispatcher, FakeNewsPlane(), name="0" * 16, clock=clock),
        relay=relay,
        responses=responses,
        background=Background(responses, models, relay, gateway="g"),
        adapters=Adapters(
            Entries(Etcd(settings.etcd), "n", "adapters"), {}, models, new_number=lambda: 1, wall_clock=time.time
        ),
        departure=Departure(60.0, call_later=asyncio.get_running_loop().call_later),
        metrics=metrics,
        clock=clock,
        wall_clock=lambda: 1_700_000_000.0,
        new_request_id=lambda: RequestId("r"),
    )
    dispatcher.stop()
    preprocessor.close()


@pytest.fixture
def reach(served):
    """Serves a gateway.  Returns: a function that sends bytes over a new connection."""

    async def start(gateway):
        address = await served(gateway)

        async def sent(data):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(data)
            status, headers = await read_head(reader)
            body = await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), 60)
            writer.close()
            return status, json.loads(body)["error"]

        return sent

    return start


def begun(path, num_bytes=1000, extra=""):
    """A request whose body never comes."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {num_bytes}\r\n{extra}\r\n".encode()


BODIES = pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/routes"])


@BODIES
async def test_the_key_is_looked_up_before_the_body_is_waited_for(gateway, reach, tmp_path, path):
    (tmp_path / "keys.toml").write_text('[[keys]]\ntenant = "t"\nkey = "sk-1"\n')
    gateway.keys.__init__(tmp_path / "keys.toml")
    sent = await reach(gateway)
    status, error = await sent(begun(path, 10**12))
    assert (status, error["code"]) == ("401", "invalid_api_key")


@BODIES
async def test_a_compressed_body_is_refused_before_it_is_read(gateway, reach, path):
    sent = await reach(gateway)
    status, error = await sent(begun(path, extra="Content-Encoding: gzip\r\n"))
    assert (status, error["code"]) == ("415", "unsupported_encoding")
    assert "'gzip'" in error["message"]


@BODIES
async def test_no_body_is_read_that_is_longer_than_any_context_can_need(gateway, reach, path):
    sent = await reach(replace(gateway, models=SimpleNamespace(longest_context=1000)))
    status, error = await sent(begun(path, (1 << 20) + 64_001))
    assert (status, error["code"]) == ("413", "body_too_large")
    assert str((1 << 20) + 64_000) in error["message"]


@BODIES
@pytest.mark.parametrize("changed", [{"read_timeout_s": 0.05}, {"request_timeout_s": 0.05}])
async def test_a_body_has_the_shorter_of_both_timeouts(settings, gateway, reach, path, changed):
    sent = await reach(replace(gateway, settings=replace(settings, **changed)))
    status, error = await sent(begun(path))
    assert (status, error["code"]) == ("408", "request_timeout")
    assert "0.05 s" in error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1/models/", "/health/"])
async def test_no_path_is_redirected(client, path):
    for method in ("GET", "POST"):
        answer = await client.request(method, path, json={})
        assert answer.status_code in (404, 405)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_health_needs_a_worker_and_life_does_not(gateway, client):
    assert (await client.get("/live")).status_code == (await client.head("/live")).status_code == 200
    health = await client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "no worker", "workers": 0})
    assert (await client.head("/health")).status_code == 503
    running = asyncio.create_task(gateway.fleet.run())
    gateway.fleet.worker_up(registration("d0"))
    for _ in range(10):
        await asyncio.sleep(0)
    health = await client.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "workers": 1})
    gateway.departure.signalled(lambda: None)
    health = await client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "leaving", "workers": 1})
    running.cancel()


async def test_the_fleet_lists_what_is_registered(gateway, client):
    gateway.fleet.worker_up(registration("d0", epoch=7 * 10**9))
    listed = (await client.get("/v1/fleet")).json()
    (worker,) = listed["workers"]
    assert (worker["worker"], worker["role"], worker["is_connected"], worker["load"]) == ("d0", "both", False, None)
    assert worker["facts"]["block_size"] == 16
    assert (listed["router"], listed["links"]) == ([], [])
    followed = listed["routing"]
    assert set(followed) == {*RoutingConfig.__struct_fields__, "refused_because"}
    assert (followed["policy"], followed["shadow_policy"], followed["queue_limit"]) == ("headrace", None, 4096)
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert (await client.head("/v1/models")).status_code == 200
    assert model == {"id": "sim", "object": "model", "created": 7, "owned_by": "headrace", "max_model_len": 4096}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/routes/never-was", 404, "not_found"),
        ("POST", "/v1/routes", 400, "invalid_json"),
        ("POST", "/tokenize", 400, "invalid_json"),
        ("POST", "/detokenize", 400, "invalid_json"),
    ],
)
async def test_every_refusal_has_openai_s_shape(client, method, path, status, code):
    refusal = await client.request(method, path)
    assert refusal.status_code == status
    assert set(refusal.json()["error"]) == {"message", "type", "param", "code"}
    assert refusal.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("DELETE", "/v1/models", {"GET", "HEAD"}),
        ("PUT", "/v1/responses/resp_1", {"GET", "DELETE"}),
    ],
)
async def test_a_refused_method_is_told_which_there_are(client, method, path, allowed):
    refusal = await client.request(method, path)
    assert refusal.status_code == 405
    assert set(refusal.headers["allow"].split(", ")) == allowed


async def test_a_bug_of_ours_has_it_too_and_tells_nothing(gateway, client):
    def broken(**_):
        raise ZeroDivisionError("secret")

    gateway.fleet.statuses = broken
    refusal = await client.get("/v1/fleet")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in refusal.text


async def test_metrics_are_there_before_the_first_request(client):
    text = (await client.get("/metrics")).text
    for name in (
        "headrace_requests_waiting",
        "headrace_index_pure_python",
        "headrace_stream_bytes_total",
        "headrace_loop_lag",
    ):
        assert name in text


async def test_keys_guard_all_that_is_below_v1(settings, gateway, tmp_path):
    (tmp_path / "keys.toml").write_text('[[keys]]\ntenant = "t"\nkey = "sk-1"\n')
    gateway.keys.__init__(tmp_path / "keys.toml")
    transport = httpx.ASGITransport(create_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for path in ("/v1/models", "/v1/fleet", "/v1/routes/r"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/v1/models", headers={"authorization": "Bearer sk-1"})).status_code == 200
        assert (await client.get("/live")).status_code == 200


async def test_a_tenant_sees_the_routes_of_its_own_requests_only(gateway, client, tmp_path):
    entries = [f'[[keys]]\ntenant = "{tenant}"\nkey = "sk-{tenant}"\n' for tenant in ("one", "two")]
    (tmp_path / "keys.toml").write_text("".join(entries))
    gateway.keys.__init__(tmp_path / "keys.toml")
    with pytest.raises(NoWorker):
        gateway.router.submit(RoutableRequest(RequestId("r"), "sim", {}, 9, 9, 60.0, tenant="one"), now=0.0)

    async def asked(tenant, request):
        return await client.get(f"/v1/routes/{request}", headers={"authorization": f"Bearer sk-{tenant}"})

    own, foreign, unknown = await asked("one", "r"), await asked("two", "r"), await asked("two", "never-was")
    assert (own.status_code, own.json()["tenant"]) == (200, "one")
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json()["error"]["code"] == unknown.json()["error"]["code"] == "not_found"
    assert foreign.text.replace("'r'", "'never-was'") == unknown.text


async def test_a_timeline_is_listed_to_the_tenant_whose_request_it_was(gateway, client, tmp_path):
    entries = [f'[[keys]]\ntenant = "{tenant}"\nkey = "sk-{tenant}"\n' for tenant in ("one", "two")]
    (tmp_path / "keys.toml").write_text("".join(entries))
    gateway.keys.__init__(tmp_path / "keys.toml")
    with pytest.raises(NoWorker):
        gateway.router.submit(RoutableRequest(RequestId("r"), "sim", {}, 9, 9, 60.0, tenant="one"), now=0.0)

    async def listed(tenant, limit="9"):
        key = {"authorization": f"Bearer sk-{tenant}"}
        return await client.get("/v1/routes", params={"limit": limit}, headers=key)

    assert (await listed("one")).json() == {"object": "list", "data": []}, "it has not ended yet"
    timeline = Timeline(RequestId("r"), "sim", gateway.clock() - 60.0, 1.0, "no_worker")
    gateway.router.ended(RequestId("r"), lambda: timeline)
    gateway.router.ended(RequestId("never-was"), pytest.fail)
    (told,) = (await listed("one")).json()["data"]
    assert (told["request"], told["code"]) == ("r", "no_worker")
    assert told["received_at"] == pytest.approx(1_700_000_000.0 - 60.0, abs=30.0)
    asked = await client.get("/v1/routes/r", headers={"authorization": "Bearer sk-one"})
    assert asked.json()["timeline"]["stages"] == []
    assert (await listed("two")).json()["data"] == []
    for limit in ("0", "1001", "x", "", "-1", "9" * 30):
        assert ((await listed("one", limit)).json()["error"]["param"]) == "limit"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"port": 70_000}, "--port is 70000: a port is 0 to 65535"),
        ({"admin_port": -1}, "--admin-port is -1: a port is 0 to 65535"),
        ({"admin_port": 8000}, "--admin-port is 8000: it must differ from --port"),
        ({"cors_origin": "a.example"}, "--cors-origin is 'a.example'"),
        ({"queue_limit": 0}, "--queue-limit is 0: it must be 1 or more"),
        ({"request_timeout_s": 0.0}, "--request-timeout-s is 0.0: it must be more than 0"),
        ({"slo_ttft_s": -1.0}, "--slo-ttft-s is -1.0"),
        ({"drain_s": float("nan")}, "--drain-s is nan"),
        ({"dead_after_s": 1.0}, "--dead-after-s is 1.0: it must exceed --heartbeat-s"),
        ({"trace_ratio": 1.5}, "--trace-ratio is 1.5: it must be from 0 to 1"),
        ({"otlp_endpoint": "collector:4318"}, "--otlp-endpoint is 'collector:4318'"),
        ({"etcd": "ftp://x"}, "--etcd is 'ftp://x'"),
        ({"namespace": "a/b"}, "--namespace is 'a/b'"),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_value(changed, message):
    with pytest.raises(UnusableSetting, match=message.replace("(", r"\(")):
        GatewaySettings(**changed)


def with_keys(gateway, tmp_path, more=""):
    (tmp_path / "keys.toml").write_text(f'[[keys]]\ntenant = "t"\nkey = "sk-1"\n{more}')
    gateway.keys.__init__(tmp_path / "keys.toml")
    return {"authorization": "Bearer sk-1"}


async def test_a_preview_counts_as_a_request_of_its_tenant(gateway, client, tmp_path):
    key = with_keys(gateway, tmp_path, "max_concurrent = 1\n")
    tenant = gateway.keys.authenticate(key)
    with gateway.keys.admitted(tenant):
        refused = await client.post("/v1/routes", headers=key, json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit")
    assert (await client.post("/v1/routes", headers=key, json={})).status_code == 400
    assert gateway.keys.num_running(tenant) == 0


async def test_only_operators_are_told_where_workers_are(gateway, client, tmp_path):
    gateway.fleet.worker_up(registration("d0"))
    address = registration("d0").address
    assert address in (await client.get("/v1/fleet")).text
    key = with_keys(gateway, tmp_path)
    refused = await client.get("/v1/fleet", headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_only")
    key = with_keys(gateway, tmp_path, "admin = true\n")
    assert address in (await client.get("/v1/fleet", headers=key)).text


async def test_what_clients_write_is_not_logged(gateway, reach):
    sent = await reach(gateway)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": {"text": "my pin is 4711"}}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with structlog.testing.capture_logs() as logged:
        status, error = await sent(head + body)
    assert (status, "4711" in error["message"]) == ("400", True), "the client may read it"
    (line,) = [line for line in logged if line["event"] == "request.finished"]
    assert (line["outcome"], line["param"]) == ("invalid_type", "messages[0].content")
    assert "4711" not in str(logged)


async def test_only_posts_of_the_two_generating_routes_go_past_the_framework(gateway):
    class Watched(Starlette):
        async def __call__(self, scope, receive, send):
            seen.append(scope["path"])

    seen = []
    app = Watched()
    app.router.routes[:] = create_app(gateway).router.routes
    front = streams_first(app)
    for path in ("/v1/chat/completions", "/v1/completions"):
        with pytest.raises(RuntimeError, match="StreamingProtocol"):
            await front({"type": "http", "method": "POST", "path": path}, None, None)
        await front({"type": "http", "method": "GET", "path": path}, None, None)
    await front({"type": "http", "method": "POST", "path": "/v1/routes"}, None, None)
    assert seen == ["/v1/chat/completions", "/v1/completions", "/v1/routes"]


@pytest.mark.parametrize(("host", "events"), [("127.0.0.1", ["listening"]), ("0.0.0.0", ["open_to_all", "listening"])])
def test_a_gateway_that_is_open_to_others_says_so_once(settings, host, events):
    with structlog.testing.capture_logs() as logged:
        _log_start(replace(settings, host=host), host, 8000)
    assert [line["event"] for line in logged] == [f"gateway.{event}" for event in events]


def test_no_two_requests_have_one_name():
    names = [name for name, _ in zip(request_ids(), range(1000), strict=False)]
    assert len(set(names)) == 1000
    assert {len(name) for name in names} == {24}
    assert all(name.isalnum() for name in names)
