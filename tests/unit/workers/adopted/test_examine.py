"""What a server must be started with to be adopted."""

import pytest

from tests.unit.workers.adopted.vllm_server import MODEL, VllmServer
from workers.adopted.examine import examine, model_directory, until_healthy
from workers.engine.base import EngineStartError


async def test_a_server_says_what_it_is():
    async with VllmServer() as server:
        facts = await examine(server.client())
    assert (facts.model, facts.root, facts.context_length, facts.version) == ("demo", "/models/smollm2", 1024, "0.32.0")
    assert (facts.block_size, facts.num_blocks) == (4, 68)
    assert (facts.events, facts.replay) == ("tcp://127.0.0.1:15557", "tcp://127.0.0.1:15558")


async def test_a_plain_server_is_told_every_flag_that_it_lacks():
    async with VllmServer() as server:
        server.sources = {}
        server.metrics = server.metrics.replace('caching="True"', 'caching="False"')
        server.forbids_tokens = True
        with pytest.raises(EngineStartError) as refused:
            await examine(server.client())
    told = str(refused.value)
    assert "--enable-scale-out" in told
    assert '--kv-events-config \'{"enable_kv_cache_events": true' in told
    assert "--enable-prefix-caching" in told
    assert server.address.netloc in told


async def test_events_that_go_nowhere_are_no_events():
    async with VllmServer() as server:
        server.sources["0"]["publisher"] = "null"
        with pytest.raises(EngineStartError, match="--kv-events-config"):
            await examine(server.client())


@pytest.mark.parametrize("endpoint", ["tcp://10.0.0.9:5557", "tcp://*:", "inproc://events"])
async def test_events_that_nobody_can_fetch_are_refused(endpoint):
    async with VllmServer() as server:
        server.sources["0"]["endpoint"] = endpoint
        with pytest.raises(EngineStartError, match="to which it connects itself"):
            await examine(server.client())


async def test_events_of_the_same_machine_may_come_by_a_file():
    async with VllmServer() as server:
        server.sources["0"] |= {"endpoint": "ipc:///tmp/events", "replay_endpoint": None}
        facts = await examine(server.client())
    assert (facts.events, facts.replay) == ("ipc:///tmp/events", "")


async def test_each_data_parallel_engine_would_need_a_worker_of_its_own():
    async with VllmServer() as server:
        server.sources["1"] = server.sources["0"]
        with pytest.raises(EngineStartError, match="2 data-parallel engines"):
            await examine(server.client())


async def test_adapters_are_no_models_and_a_name_may_be_chosen():
    async with VllmServer() as server:
        adapter = MODEL | {"id": "lora", "parent": "demo"}
        server.models["data"] = [adapter, MODEL, MODEL | {"id": "alias"}]
        assert (await examine(server.client())).model == "demo"
        assert (await examine(server.client(), served_model_name="alias")).model == "alias"
        with pytest.raises(EngineStartError, match=r"\['demo', 'alias'\], and none is 'lora'"):
            await examine(server.client(), served_model_name="lora")


async def test_a_server_that_wants_a_key_says_so():
    async with VllmServer() as server:
        server.wants_key = True
        with pytest.raises(EngineStartError, match="--server-key-file"):
            await examine(server.client())


async def test_something_else_is_no_vllm_server():
    async with VllmServer() as server:
        server.models = ["llama"]
        with pytest.raises(EngineStartError, match="is not what vLLM says"):
            await examine(server.client())


async def test_a_server_without_metrics_cannot_be_known():
    async with VllmServer() as server:
        server.metrics = ""
        with pytest.raises(EngineStartError, match="block_size in vllm:cache_config_info"):
            await examine(server.client())


async def test_a_healthy_server_is_not_waited_for():
    async with VllmServer() as server:
        await until_healthy(server.client(), wait_s=5, progress=pytest.fail)


async def test_a_server_that_does_not_come_is_given_up():
    said = []
    async with VllmServer() as server:
        server.health = 503
        with pytest.raises(EngineStartError, match=r"within 0\.2 s \(--wait-s\): its /health says 503"):
            await until_healthy(server.client(), wait_s=0.2, progress=said.append)
    assert len(said) == 1
    with pytest.raises(EngineStartError, match="nobody answers"):
        await until_healthy(server.client(), wait_s=0.2, progress=said.append)


def test_the_tokenizer_is_where_the_server_found_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model_directory(None, str(tmp_path), fetched=pytest.fail) == tmp_path
    assert model_directory(str(tmp_path), "org/model", fetched=pytest.fail) == tmp_path


@pytest.mark.parametrize(("named", "root", "asked"), [(None, "org/model", "org/model"), ("a/b", "/gone", "a/b")])
def test_or_at_the_hub(named, root, asked, tmp_path):
    assert model_directory(named, root, fetched=lambda name: tmp_path / name) == tmp_path / asked


def test_a_model_that_is_not_here_must_be_named(tmp_path):
    with pytest.raises(EngineStartError, match=r"is no directory with a tokenizer\.json here: name by --model"):
        model_directory(None, str(tmp_path), fetched=pytest.fail)
