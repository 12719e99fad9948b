import http.server
import json
import threading
from dataclasses import replace

import msgspec
import pytest

from loadtest import like, simulate
from loadtest.simulator.scenario import Link, Scenario, engine_facts
from loadtest.simulator.simulation import Simulation
from loadtest.workloads import load
from planes.wire.errors import UnusableSetting
from planes.wire.messages import LatencyPrior, Role
from process.settings import run
from router.router import Router
from tests.fakes import registration

FACTS = engine_facts(block_size=512, num_blocks=1000, link_gbps=100)


def told(*workers, links=()):
    """A body of `GET /v1/fleet`, with more in it than is wanted. workers: name, role, prefill seconds a token."""
    return {
        "num_waiting": 0,
        "workers": [
            {"worker": name, "role": role, "model": "m", "address": "x", "facts": msgspec.to_builtins(FACTS)}
            for name, role, _ in workers
        ],
        "router": [
            {
                "worker": name,
                "num_samples": 9,
                "speed": 1.0,
                "latency": msgspec.to_builtins(LatencyPrior(prefill_per_token_s=per_token_s)),
            }
            for name, _, per_token_s in workers
        ],
        "links": [
            {"prefill": giver, "decode": taker, "fixed_s": fixed_s, "bytes_per_s": 5e9, "error_ratio": 0.0}
            for giver, taker, fixed_s in links
        ],
    }


def test_workers_are_as_fast_as_the_router_has_learned():
    fleet = like.read_fleet(told(("a", "prefill", 1e-3), ("b", "decode", 2e-3)))
    assert [(each.worker, each.role, each.facts.latency.prefill_per_token_s) for each in fleet.workers] == [
        ("a", Role.PREFILL, 1e-3),
        ("b", Role.DECODE, 2e-3),
    ]
    assert fleet.facts.num_blocks == 1000


def test_what_the_router_tells_is_what_is_read():
    router = Router()
    facts = msgspec.structs.replace(registration("w").facts, latency=LatencyPrior(prefill_per_token_s=3e-3))
    for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
        router.worker_up(msgspec.structs.replace(registration(name, role), facts=facts))
    body = told(("p", "prefill", 0.0), ("d", "decode", 0.0))
    body["router"] = msgspec.to_builtins(router.workers(now=0.0))
    body["links"] = msgspec.to_builtins(router.links())
    fleet = like.read_fleet(json.loads(json.dumps(body)))
    assert [each.facts.latency.prefill_per_token_s for each in fleet.workers] == [pytest.approx(3e-3)] * 2
    assert [each.num_samples for each in fleet.workers] == [0, 0]


def test_a_larger_fleet_is_made_of_the_same_workers_over_and_over():
    fleet = like.read_fleet(
        told(("a", "prefill", 1e-3), ("b", "prefill", 2e-3), ("c", "decode", 3e-3), links=[("b", "c", 0.7)])
    )
    scenario = fleet.scenario(Scenario("headrace", 3, 2, 0, FACTS))
    speeds = [scenario.facts_of(name).latency.prefill_per_token_s for name, _ in scenario.workers()]
    assert speeds == [1e-3, 2e-3, 1e-3, 3e-3, 3e-3]
    names = [name for name, _ in scenario.workers()]
    assert scenario.link(names[1], names[4]) == Link(0.7, 5e9)
    assert scenario.link(names[0], names[4]).fixed_s == LatencyPrior().handover_fixed_s


def test_a_role_that_nobody_has_is_played_by_all():
    fleet = like.read_fleet(told(("a", "prefill", 1e-3), ("b", "decode", 2e-3)))
    scenario = fleet.scenario(Scenario("headrace", 0, 0, 3, FACTS))
    speeds = [scenario.facts_of(name).latency.prefill_per_token_s for name, _ in scenario.workers()]
    assert speeds == [1e-3, 2e-3, 1e-3]


def test_a_simulated_worker_is_as_fast_as_its_own_facts():
    slow = msgspec.structs.replace(FACTS, latency=LatencyPrior(prefill_per_token_s=1.0))
    base = Scenario("round_robin", 0, 0, 2, FACTS)
    scenario = replace(base, own_facts={base.workers()[1][0]: slow})
    records = Simulation(scenario, load("uniform", block_size=512, seed=0).scaled(0.01).limited(2)).run().records
    first, second = (record.ttft_s for record in records)
    assert first < 2 < records[1].prompt_tokens - 1 < second


def test_a_handover_takes_as_long_as_its_own_link():
    base = Scenario("round_robin", 1, 1, 0, FACTS)
    giver, taker = (name for name, _ in base.workers())
    workload = load("uniform", block_size=512, seed=0).scaled(0.01).limited(1)
    ends = []
    for links in ({}, {(giver, taker): Link(50.0, 1e9)}):
        (record,) = Simulation(replace(base, own_links=links), workload).run().records
        ends.append(record.last_at)
    assert ends[1] - ends[0] == pytest.approx(50.0, abs=1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.update(workers=[]), "no worker that generates; it has none"),
        (lambda body: body["workers"][0].update(model="other"), "it serves m, other; --like-model says which"),
        (lambda body: body["workers"][0]["facts"].update(block_size=16), r"blocks of \[16, 512\] tokens"),
        (lambda body: body.pop("links"), "missing required field `links`"),
    ],
)
def test_a_fleet_that_cannot_be_taken_says_why(change, words):
    body = told(("a", "prefill", 1e-3), ("b", "decode", 2e-3))
    change(body)
    with pytest.raises(ValueError, match=words):
        like.read_fleet(body)


def test_one_model_of_several_is_taken_by_name():
    body = told(("a", "prefill", 1e-3), ("b", "decode", 2e-3))
    body["workers"][0]["model"] = "other"
    assert [each.worker for each in like.read_fleet(body, "m").workers] == ["b"]


def test_a_context_that_the_cache_does_not_hold_is_cut():
    body = told(("a", "both", 1e-3))
    body["workers"][0]["facts"] |= {"num_blocks": 10}
    assert like.read_fleet(body).facts.context_length == 5119


@pytest.fixture
def gateway():
    """A server that tells a fleet to whoever has the key; its URL."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_known = self.headers.get("Authorization") == "Bearer sk-1"
            self.send_response(200 if is_known and self.path == "/v1/fleet" else 401)
            self.end_headers()
            self.wfile.write(json.dumps(told(("a", "both", 1e-4), ("b", "both", 1e-4))).encode())

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_the_simulator_takes_speed_and_size_from_a_gateway(gateway, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(like.KEY_VARIABLE, "sk-1")
    flags = f"--trace uniform --limit 5 --policies random --like {gateway} --json {tmp_path}/out.json"
    with pytest.raises(SystemExit, match="0"):
        run(simulate.app, flags.split())
    assert "2 both" in capsys.readouterr().out
    engine = json.loads((tmp_path / "out.json").read_text())["settings"]["engine"]
    assert engine["latency"]["prefill_per_token_s"] == 1e-4


def test_a_gateway_that_wants_a_key_is_told_apart_from_none(gateway, monkeypatch):
    monkeypatch.delenv(like.KEY_VARIABLE, raising=False)
    with pytest.raises(UnusableSetting, match="answers 401; its API key goes into HEADRACE_API_KEY"):
        like.live_fleet(gateway)
    with pytest.raises(UnusableSetting, match="no gateway answers there"):
        like.live_fleet("http://127.0.0.1:1")
    with pytest.raises(UnusableSetting, match="it must begin with http"):
        like.live_fleet("gateway:8000")
