"""Dashboards and alerts against what a live fleet really exposes, in a real Prometheus."""

import asyncio
import json
import re
import shutil
import signal
import subprocess

import httpx
import pytest
import yaml

from app.cli.servers import free_port
from tests.integration.conftest import PATIENCE_S, ROOT, Process, poll_until

FOLDER = ROOT / "docker" / "observability"
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))
METRIC = re.compile(r"\b(?:headrace_|vllm:)[a-z0-9_:]+")
SELECTOR = re.compile(r"\b(?:(?:headrace_|vllm:)[a-z0-9_:]+|up)(?:\{[^}]*\})?")
NOT_SEEN = {"headrace_fallbacks_total", "headrace_retries_total", "headrace_worker_failed_legs_total"}
"""Nothing in this test makes them count: they are checked by name alone."""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="needs Debian's prometheus: make observability-test installs it",
    ),
]


def dashboard_queries():
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.stem}: {panel['title']}", expanded(target["expr"])


def expanded(expr):
    """As Grafana fills it in, with everything chosen."""
    return re.sub(r"\$(?:model|worker)\b", ".*", expr).replace("$__rate_interval", "30s")


def alert_rules():
    return [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def test_each_alert_fires_when_it_should_and_only_then():
    told = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr
    tested = (FOLDER / "alerts_test.yml").read_text()
    for rule in alert_rules():
        assert f"name: {rule['alert']}\n" in tested
        assert f"name: {rule['alert']} stays silent\n" in tested
        assert rule["annotations"].keys() == {"summary", "action"}


@pytest.mark.parametrize("config", ["prometheus.yml", "compose.yml"])
def test_a_configuration_of_ours_is_one(config):
    told = subprocess.run(
        ["promtool", "check", "config", config], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr


def test_dashboards_name_every_panel_and_overlap_nowhere():
    for path in DASHBOARDS:
        taken = set()
        for panel in json.loads(path.read_text())["panels"]:
            place = panel["gridPos"]
            cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
            assert panel["title"]
            assert place["x"] + place["w"] <= 24
            assert not cells & taken, f"{path.stem}: {panel['title']}"
            taken |= cells


class Prometheus:
    def __init__(self, process, url):
        self.process = process
        self._http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S)

    async def asked(self, path, **query):
        answer = (await self._http.get(f"/api/v1/{path}", params=query)).json()
        assert answer["status"] == "success", f"{query}: {answer}"
        return answer["data"]

    async def query(self, expr):
        return (await self.asked("query", query=expr))["result"]

    async def close(self):
        await self._http.aclose()
        self.process.kill()


async def prometheus(folder, targets):
    port = free_port("prometheus", 0)
    jobs = [{"job_name": job, "static_configs": [{"targets": each}]} for job, each in targets.items()]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(FOLDER / "alerts.yml")],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    argv = [
        str(shutil.which("prometheus")),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = Process("prometheus", argv, folder / "prometheus.log")
    await process.says("Server is ready to receive web requests")
    return Prometheus(process, f"http://127.0.0.1:{port}")


async def metrics_target(worker):
    line = await worker.says("event=metrics.listening")
    return "127.0.0.1:" + next(word for word in line.split() if word.startswith("port=")).removeprefix("port=")


async def load(api, unique, lost):
    """Every kind of end, once or more; `lost` dies under a stream, which goes on elsewhere."""
    for number in range(6):
        asked = {"x-headrace-handover": "never" if number % 3 == 2 else "always"}
        assert (await api.chat(f"{unique} {number % 2}", headers=asked)).status_code == 200
    slow = await api.chat(unique, slo_ttft_ms=0.001)
    late = await api.chat(unique, max_tokens=20_000, timeout_ms=200)
    assert (slow.json()["error"]["code"], late.json()["error"]["code"]) == ("slo_missed", "deadline")
    streams = [asyncio.create_task(streamed(api, f"{number} {unique}")) for number in range(4)]
    await poll_until(lambda: all(stream.done() or stream in BEGUN for stream in streams), "streams have begun")
    lost.send(signal.SIGKILL)
    await asyncio.gather(*streams)


BEGUN = set()


async def streamed(api, prompt):
    async with api.stream(prompt, max_tokens=600) as stream:
        await stream.read(3)
        BEGUN.add(asyncio.current_task())
        await stream.read()
        assert stream.is_done


async def test_every_query_finds_what_a_live_fleet_tells(site, reach, unique, tmp_path):
    flags = ("--metrics-port", "0")
    workers = [await site.worker(name, *flags, speedup=1) for name in ("prefill-1", "decode-1", "decode-2")]
    gateway = await site.gateway(num_workers=3)
    targets = [await metrics_target(worker) for worker in workers]
    server = await prometheus(
        tmp_path, {"headrace-gateway": [gateway.url.removeprefix("http://")], "headrace-worker": targets}
    )
    try:
        await poll_until(lambda: is_scraped(server, 4), "all are scraped")
        async with reach(gateway) as api:
            await load(api, unique, workers[2])
            exposed = (await api.get("/metrics")).text
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            exposed += (await client.get(f"http://{targets[1]}/metrics")).text
        await poll_until(lambda: has(server, "rate(headrace_migrations_total[30s])"), "the end is scraped")
        await check_names(exposed)
        await check_queries(server)
        rules = await server.asked("rules")
        evaluated = [rule for group in rules["groups"] for rule in group["rules"]]
        assert {rule["name"] for rule in evaluated} == {rule["alert"] for rule in alert_rules()}
        await poll_until(lambda: is_evaluated(server), "each rule is evaluated")
    finally:
        await server.close()


async def is_scraped(server, count):
    return len(await server.query("up == 1")) == count


async def has(server, expr):
    return bool(await server.query(expr))


async def is_evaluated(server):
    rules = [rule for group in (await server.asked("rules"))["groups"] for rule in group["rules"]]
    assert all(rule["health"] != "err" for rule in rules), rules
    return all(rule["health"] == "ok" for rule in rules)


async def check_names(exposed):
    families = {line.split(" ")[2] for line in exposed.splitlines() if line.startswith("# TYPE")}
    for where, expr in [*dashboard_queries(), *((rule["alert"], rule["expr"]) for rule in alert_rules())]:
        for name in METRIC.findall(expr):
            bare = name.removesuffix("_bucket")
            assert {name, bare} & families, f"{where}: nobody exposes {name}"


async def check_queries(server):
    for where, expr in dashboard_queries():
        if not NOT_SEEN & set(METRIC.findall(expr)):
            assert await server.query(expr), f"{where}: nothing found by {expr}"
    for rule in alert_rules():
        await server.query(rule["expr"])
        for selector in SELECTOR.findall(rule["expr"]):
            if not NOT_SEEN & set(METRIC.findall(selector)):
                assert await server.query(selector), f"{rule['alert']}: nothing found by {selector}"
