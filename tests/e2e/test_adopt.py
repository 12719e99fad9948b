"""Two `vllm serve` that nobody has changed, adopted: one for prompts and answers, one for answers alone."""

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import dataclass

import httpx
import pytest
import pytest_asyncio

from loadtest.processes import free_port
from tests.integration.conftest import PATIENCE_S, Api, Process, Site, poll_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(2400),
]

START_S = 4 * PATIENCE_S
"""For a machine with other things to do."""
BLOCK = 32
NIXL = '''
"""As the wheel `nixl` does: the one for the CUDA that is here, under that name. Its thread leaves tests some CPU."""
import importlib, sys
from workers.nixl_wheel import installed_wheel
from workers.vllm.plugin.nixl import calm

for module in ("_bindings", "_api"):
    sys.modules[f"nixl.{module}"] = importlib.import_module(f"{installed_wheel()}.{module}")
binding = sys.modules["nixl._api"].nixlBind
binding.nixlAgentConfig = calm(binding.nixlAgentConfig)
'''
"""vLLM asks for a module of that name, which no wheel has that an extra of ours names."""
TEXT = " ".join(f"Note {i}: gate {i * 7 % 13} of the weir lets {i * i % 17} buckets to the wheel." for i in range(12))


@dataclass
class Server:
    process: Process
    url: str

    def end(self):
        """With its engine process, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    async def num_requests(self):
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S) as http:
            text = (await http.get("/metrics")).text
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(names))


class Servers:
    """vLLM's own server. `vllm serve` is this module; the command itself looks for a distribution named vllm, which the
    one for CPUs is not.
    """

    def __init__(self, site, model):
        self.site, self.model = site, model
        self.all = []
        (site.logs / "nixl").mkdir()
        (site.logs / "nixl" / "__init__.py").write_text(NIXL)

    def start(self, name, *flags):
        port = free_port()
        own = ["--host", "127.0.0.1", "--port", str(port), "--model", str(self.model), "--served-model-name", "demo"]
        small = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8", "--block-size", str(BLOCK)]
        small += ["--kv-cache-memory-bytes", str(96 << 20), "--enforce-eager"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.site.logs), *filter(None, [os.environ.get("PYTHONPATH")]), "."]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        argv = ["vllm.entrypoints.openai.api_server", *own, *small, *flags]
        server = Server(self.site.start(name, argv, environment), f"http://127.0.0.1:{port}")
        self.all.append(server)
        return server

    def start_for_handovers(self, name, role):
        connector = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        ports = free_port(), free_port()
        events = {"enable_kv_cache_events": True, "endpoint": f"tcp://*:{ports[0]}"}
        events["replay_endpoint"] = f"tcp://*:{ports[1]}"
        told = ["--kv-transfer-config", json.dumps(connector), "--kv-events-config", json.dumps(events)]
        return self.start(name, "--enable-scale-out", "--enable-prompt-tokens-details", *told)


@dataclass
class Fleet:
    site: Site
    servers: Servers
    both: Server
    decode: Server
    beside_decode: Process
    api: Api


def adopt(site, name, role, server, *flags):
    own = ["--role", role, "--worker-id", name, "--max-batch", "8", "--wait-s", str(START_S)]
    return site.start(name, ["workers.adopted", server.url, *own, *site.flags, *flags])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(etcd_url, nats_url, tmp_path_factory, demo_model):
    site = Site(etcd_url, nats_url, tmp_path_factory.mktemp("adopt"))
    servers = Servers(site, demo_model)
    try:
        both = servers.start_for_handovers("vllm-both", "kv_both")
        decode = servers.start_for_handovers("vllm-decode", "kv_consumer")
        beside = [adopt(site, "both-1", "both", both), adopt(site, "decode-1", "decode", decode)]
        for worker, server in zip(beside, (both, decode), strict=True):
            await poll_until(lambda w=worker: w.said("event=worker.ready") or not w.is_running, seconds=START_S)
            assert worker.said("event=worker.ready"), worker.log.read_text() + server.process.log.read_text()[-3000:]
        gateway = await site.gateway(num_workers=2)
        async with Api(gateway.url) as api:
            yield Fleet(site, servers, both, decode, beside[1], api)
    finally:
        for server in servers.all:
            server.end()
        site.close()


@pytest.fixture
def api(fleet):
    return fleet.api


def tokens(count, seed):
    return [(i * 37 + seed * 101) % 40_000 + 100 for i in range(count)]


def body(prompt, salt, **fields):
    same = {"model": "demo", "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    return same | {"return_token_ids": True, "cache_salt": salt} | fields


async def complete(api, handover, prompt, salt, **fields):
    """The answer's tokens, and who served it."""
    headers = {"x-headrace-handover": handover}
    answer = await api.post("/v1/completions", json=body(prompt, salt, **fields), headers=headers)
    assert answer.status_code == 200, answer.text
    served = (answer.headers["x-headrace-prefill"], answer.headers["x-headrace-decode"])
    return answer.json()["choices"][0]["token_ids"], served


@contextlib.asynccontextmanager
async def streaming(api, handover, prompt, salt, **fields):
    """Gives the choices of a stream's events, and its error if there is one."""
    headers = {"x-headrace-handover": handover}
    async with httpx.AsyncClient(base_url=api.url, timeout=PATIENCE_S) as http:
        asked = body(prompt, salt, stream=True, **fields)
        async with http.stream("POST", "/v1/completions", json=asked, headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            yield events(response)


async def events(response):
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            yield event.get("error") or event["choices"][0]


async def streamed(api, handover, prompt, salt, **fields):
    async with streaming(api, handover, prompt, salt, **fields) as said:
        return [token async for choice in said for token in choice["token_ids"]]


@pytest.mark.parametrize("prompt", [TEXT, tokens(2 * BLOCK, 1), tokens(2 * BLOCK + 5, 2), tokens(3, 3)])
async def test_a_handed_over_answer_is_what_one_engine_gives_alone(api, prompt):
    name = f"{prompt[:3]}"
    together, served = await complete(api, "always", prompt, f"together {name}")
    assert served == ("both-1", "decode-1")
    alone, (prefill, decode) = await complete(api, "never", prompt, f"alone {name}")
    assert prefill == decode
    assert len(together) == 20
    assert together == alone
    assert await streamed(api, "always", prompt, f"streamed {name}") == alone


async def test_what_depends_on_an_answer_s_own_tokens_is_handed_over_whole(api):
    fields = {"temperature": 0.9, "seed": 5, "presence_penalty": 0.8, "frequency_penalty": 0.3}
    alone, _ = await complete(api, "never", TEXT, "seeded alone", **fields)
    together = await streamed(api, "always", TEXT, "seeded together", **fields)
    assert together == alone
    assert together != await streamed(api, "always", TEXT, "greedy together")


async def test_the_gateway_knows_what_the_servers_have_cached(api):
    asked = {"model": "demo", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 8, "cache_salt": "cached"}
    first = await api.post("/v1/chat/completions", json=asked, headers={"x-headrace-handover": "always"})
    whole = first.json()["usage"]["prompt_tokens"] // BLOCK * BLOCK
    assert whole > 0

    async def known():
        preview = (await api.post("/v1/routes", json=asked)).json()
        return {each["decode"]: each["decode_cached_tokens"] for each in preview["candidates"]}

    await poll_until(lambda: _equal(known, {"both-1": whole, "decode-1": whole}))
    second = await api.post("/v1/chat/completions", json=asked)
    assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == whole


async def _equal(ask, expected):
    return await ask() == expected


async def test_answers_match_a_grammar_and_one_that_cannot_be_is_the_client_s_fault(api):
    fields = {"structured_outputs": {"regex": "(ab){3}"}, "ignore_eos": False}
    asked = body(TEXT, "grammar", **fields)
    answer = await api.post("/v1/completions", json=asked, headers={"x-headrace-handover": "always"})
    assert answer.json()["choices"][0]["text"] == "ababab"
    wrong = await api.post("/v1/completions", json=asked | {"structured_outputs": {"regex": "(ab"}})
    assert wrong.status_code == 400, wrong.text


async def test_log_probabilities_are_the_server_s(api):
    asked = body(TEXT, "logprobs", logprobs=3)
    for handover in ("always", "never"):
        answer = await api.post("/v1/completions", json=asked, headers={"x-headrace-handover": handover})
        told = answer.json()["choices"][0]["logprobs"]
        assert [len(top) for top in told["top_logprobs"]] == [3] * 20
        assert all(
            max(top.values()) == own for top, own in zip(told["top_logprobs"], told["token_logprobs"], strict=True)
        )


async def test_a_cancelled_stream_ends_at_the_server(fleet):
    async with streaming(fleet.api, "always", TEXT, "cancelled", max_tokens=500) as said:
        await anext(said)
        await anext(said)
        assert await fleet.decode.num_requests() == 1
    await poll_until(lambda: _equal(fleet.decode.num_requests, 0))


async def test_when_a_server_dies_its_streams_go_on_elsewhere_or_end_with_a_clear_error(fleet):
    api = fleet.api
    alone, _ = await complete(api, "never", TEXT, "dies alone", max_tokens=60)

    async def read(said, has_begun):
        found, failed = [], None
        async for choice in said:
            if "token_ids" in choice:
                found += choice["token_ids"]
            else:
                failed = choice
            if len(found) >= 5:
                has_begun.set()
        return found, failed

    begun = [asyncio.Event(), asyncio.Event()]
    async with (
        streaming(api, "always", TEXT, "dies greedy", max_tokens=60) as greedy,
        streaming(api, "always", TEXT, "dies bound", max_tokens=500, presence_penalty=0.5) as bound,
        asyncio.TaskGroup() as group,
    ):
        reading = [group.create_task(read(said, event)) for said, event in zip((greedy, bound), begun, strict=True)]
        await asyncio.gather(*(event.wait() for event in begun))
        fleet.decode.end()
    (tokens_of_greedy, nothing), (some, failed) = (task.result() for task in reading)
    assert (tokens_of_greedy, nothing) == (alone, None)
    assert 5 <= len(some) < 500
    assert failed["code"] == "not_resumable", failed
    assert await fleet.beside_decode.ended() == 1
    assert "the vLLM server is gone" in fleet.beside_decode.log.read_text()
    await poll_until(lambda: _equal(lambda: _workers(api), {"both-1"}))
    assert (await complete(api, "auto", TEXT, "after"))[1] == ("both-1", "both-1")


async def _workers(api):
    return set(await api.fleet())


async def test_a_plain_server_is_refused_with_what_to_add(fleet):
    plain = fleet.servers.start("vllm-plain")
    refused = adopt(fleet.site, "both-2", "both", plain)
    await poll_until(lambda: not refused.is_running, seconds=START_S)
    told = refused.log.read_text()
    assert await refused.ended() == 2, told
    assert "--enable-scale-out" in told
    assert "--kv-events-config" in told


async def test_a_worker_that_is_asked_to_end_leaves_its_server_running(fleet):
    (beside,) = [process for process in fleet.site.processes if process.name == "both-1"]
    beside.send(signal.SIGTERM)
    assert await beside.ended() == 0
    assert await fleet.both.num_requests() == 0
    await poll_until(lambda: _equal(lambda: _workers(fleet.api), set()))
