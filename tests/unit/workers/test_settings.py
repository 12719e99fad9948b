import json
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from planes.wire.errors import UnusableSetting
from planes.wire.messages import HandoverMode, Role
from workers import command
from workers.settings import SIM_MODEL, WorkerSettings


def test_the_simulated_engine_needs_no_settings():
    settings = WorkerSettings(engine="sim")
    assert settings.model_path == SIM_MODEL
    assert settings.model_name == "sim"
    assert settings.worker_role is Role.BOTH
    assert settings.handover_mode is HandoverMode.PULL


def test_a_model_is_called_like_its_directory(tmp_path):
    model = tmp_path / "gemma"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    assert WorkerSettings(engine="sim", model=model).model_name == "gemma"
    assert WorkerSettings(engine="sim", model=model, served_model_name="g").model_name == "g"


def test_vllm_serves_the_demo_model_if_none_is_named(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    made = WorkerSettings(engine="vllm").with_model(lambda: tmp_path)
    assert (made.model_path, made.model_name) == (tmp_path, "smollm2-135m")
    assert made.dtype == "float32"
    assert WorkerSettings(engine="vllm", dtype="bfloat16").with_model(lambda: tmp_path).dtype == "bfloat16"
    assert WorkerSettings(engine="vllm", served_model_name="mill").with_model(lambda: tmp_path).model_name == "mill"


def test_a_named_model_and_a_simulated_one_need_no_demo_model(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    named = WorkerSettings(engine="vllm", model=tmp_path)
    assert named.with_model(pytest.fail) is named
    simulated = WorkerSettings(engine="sim")
    assert simulated.with_model(pytest.fail) is simulated


@pytest.mark.parametrize(("cores", "numbers"), [(None, ()), ("3", (3,)), ("0-2,6", (0, 1, 2, 6)), ("4, 1-1", (1, 4))])
def test_cores_are_numbers_and_ranges(cores, numbers):
    assert WorkerSettings(engine="sim", cores=cores).core_numbers() == numbers


def test_no_handover_is_a_setting():
    assert WorkerSettings(engine="sim", handover="none").handover_mode is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 70000}, "--port is 70000: a port is 0 to 65535"),
        ({"block_size": 0}, "--block-size is 0: it must be 1 or more"),
        ({"max_queued": -1}, "--max-queued is -1: it must be 0 or more"),
        ({"sim_kv_bytes_per_token": 12}, "--sim-kv-bytes-per-token is 12: it must be a multiple of 8"),
        ({"speedup": 0.0}, "--speedup is 0.0: it must be more than 0"),
        ({"speedup": float("nan")}, "--speedup is nan"),
        ({"drain_s": -1.0}, "--drain-s is -1.0"),
        ({"heartbeat_s": 3.0}, "--dead-after-s is 3.0: it must exceed --heartbeat-s"),
        (
            {"prefill_dispatch": "queue", "handover": "push"},
            "--prefill-dispatch is 'queue': queue needs --handover pull",
        ),
        ({"prefill_dispatch": "queue", "role": "prefill", "handover": "none"}, "it is none"),
        ({"pull_ahead": 0}, "--pull-ahead is 0: it must be 1 or more"),
        ({"cores": "2-1"}, "--cores is '2-1'"),
        ({"cores": "a"}, "--cores is 'a'"),
        ({"etcd": "ftp://x"}, "--etcd is 'ftp://x'"),
        ({"nats": "http://x"}, "--nats is 'http://x'"),
        ({"namespace": "a b"}, "--namespace is 'a b'"),
        ({"worker_id": "a/b"}, "--worker-id is 'a/b'"),
        ({"served_model_name": ""}, "--served-model-name is ''"),
        ({"engine_args": "--seed 1"}, "--engine-args is '--seed 1': they are vLLM's, and the simulated engine"),
        ({"engine_config": Path("x.yaml")}, "--engine-config is 'x.yaml': they are vLLM's"),
        ({"engine_args": "--x 'y"}, '--engine-args is "--x \'y": quotes must be closed'),
        ({"advertise_host": "0.0.0.0"}, "--advertise-host is '0.0.0.0': name an address"),
        ({"model": Path("/nowhere")}, "--model is '/nowhere': not the directory of a model"),
    ],
)
def test_an_unusable_setting_is_named_with_its_value_and_what_is_allowed(changes, message):
    with pytest.raises(UnusableSetting) as caught:
        WorkerSettings(**({"engine": "sim"} | changes))
    assert message in str(caught.value)


def test_vllm_needs_a_config_beside_the_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnusableSetting, match=r"no config\.json"):
        WorkerSettings(engine="vllm", model=tmp_path)


def start(*flags):
    command.app(flags, exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "sim", "--port", "many"], "many"),
        (["--engine", "magic"], "magic"),
        (["--engine", "sim", "--no-such-flag"], "no-such-flag"),
        (["--engine", "sim", "--block-size", "0"], "--block-size is 0"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_flag_and_its_value(flags, words):
    with pytest.raises((CycloptsError, UnusableSetting), match=words):
        start(*flags)


def test_settings_also_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("HEADRACE_BLOCK_SIZE", "-5")
    with pytest.raises(UnusableSetting, match="--block-size is -5"):
        start("--engine", "sim")


def test_the_built_in_model_has_what_a_gateway_needs():
    config = json.loads((SIM_MODEL / "tokenizer_config.json").read_text())
    assert config["chat_template"]


def test_a_decode_worker_leaves_the_queue_alone():
    queue = {"engine": "sim", "prefill_dispatch": "queue"}
    assert WorkerSettings(role="both", **queue).is_pulling
    assert not WorkerSettings(role="decode", handover="push", **queue).is_pulling
    assert not WorkerSettings(role="prefill", engine="sim").is_pulling


@pytest.mark.parametrize("engine", ["sim", "vllm"])
@pytest.mark.parametrize("changed", [{"role": "decode"}, {"prefill_dispatch": "queue"}])
def test_vectors_are_made_by_workers_that_do_all_of_it(changed, engine):
    name = next(iter(changed)).replace("_", "-")
    with pytest.raises(UnusableSetting, match=f"--{name} is .*: with --task embed it must be"):
        WorkerSettings(**{"engine": engine, "task": "embed", **changed})
    assert WorkerSettings(engine=engine, task="embed").handover_mode is None
