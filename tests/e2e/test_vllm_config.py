"""vLLM takes every configuration that a worker can ask it for. No GPU is needed to find that out."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from planes.wire.messages import HandoverMode, Role

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

DRIVER = Path(__file__).parent / "config_driver.py"
ROOT = DRIVER.parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory, demo_model):
    """Tells what the driver says of a platform."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm"))}

    def ask(platform, *changes):
        command = [sys.executable, str(DRIVER), platform, str(demo_model)]
        command += [msgspec.json.encode(changes).decode()] if changes else []
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return [
            line.partition(" ")[::2] for line in done.stdout.splitlines() if line.startswith(("config ", "refused "))
        ]

    return ask


@pytest.fixture(scope="module")
def configurations(told):
    """By platform. CPU comes first: what it finds out about the model is in the cache then, and needs no CUDA build."""
    return {platform: [msgspec.json.decode(line) for _, line in told(platform)] for platform in ("cpu", "cuda")}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_vllm_takes_every_role_with_every_handover(configurations, platform):
    made = [told for told in configurations[platform] if told["runner"] == "generate"]
    assert {(told["role"], told["handover"]) for told in made} == {
        (role, handover) for role in Role for handover in (*HandoverMode, None)
    }
    assert {told["device"] for told in made} == {platform}
    assert {told["buffer"] for told in made if told["handover"]} == {platform}
    connectors = {"pull": "NixlPullConnector", "push": "NixlPushConnector", None: None}
    assert all(told["connector"] == connectors[told["handover"]] for told in made)


def test_what_nobody_said_is_as_the_platform_can(configurations):
    """The model has 8,192 positions."""
    made = {
        platform: [told for told in configurations[platform] if told["runner"] == "generate"]
        for platform in configurations
    }
    assert {(told["context"], told["sequences"]) for told in made["cpu"]} == {(2048, 32)}
    assert {told["step_tokens"] for told in made["cpu"] if told["role"] == "decode"} == {40}
    assert {told["context"] for told in made["cuda"]} == {8192}
    assert {told["sequences"] >= 256 for told in made["cuda"]} == {True}
    assert {told["step_tokens"] >= 2048 for told in made["cuda"]} == {True}


def test_engine_arguments_are_vllms_and_count_more_than_the_workers(told, tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("max-model-len: 512\nseed: 7\nenable-lora: true\n")
    whole = {
        "arguments": ["--max-model-len", "1k", "--dtype=bfloat16", "--max_loras", "3"],
        "arguments_file": str(file),
    }
    refused = [
        {"arguments": ["--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}']},
        {"arguments": ["--no-such-thing", "1"]},
        {"arguments": ["--max-num-seqs", "many"]},
        {"arguments": ["decode"]},
        {"arguments": ["--help"]},
        {"arguments_file": str(tmp_path / "nowhere.yaml")},
        {"arguments": ["--config", str(file), "--seed", "8"]},
    ]
    (kind, line), *others = told("cpu", whole, *refused)
    made = msgspec.json.decode(line)
    assert (kind, made["context"], made["dtype"]) == ("config", 1000, "torch.bfloat16")
    assert (made["seed"], made["lora"]) == (7, 3)
    *others, (kind, line) = others
    assert (kind, msgspec.json.decode(line)["seed"]) == ("config", 8)
    assert {kind for kind, _ in others} == {"refused"}
    beginning = "engine arguments (after --, --engine-args, --engine-config): "
    assert all(reason.startswith(beginning) for _, reason in others)
    assert [reason.removeprefix(beginning).split(":")[0] for _, reason in others] == [
        "--kv-transfer-config cannot be given",
        "unrecognized arguments",
        "argument --max-num-seqs",
        "unrecognized arguments",
        "unrecognized arguments",
        "FileNotFoundError",
    ]


def test_a_gpus_worker_has_as_many_parts_as_its_arguments_say(told):
    (kind, line), (other, reason) = told(
        "cuda",
        {"arguments": ["--gpu-memory-utilization", "0.5", "--quantization", "fp8"]},
        {"arguments": ["--pipeline-parallel-size", "2"]},
    )
    assert (kind, msgspec.json.decode(line)["parts"]) == ("config", 1)
    assert (other, "1 GPUs are visible" in reason, "needs 2" in reason) == ("refused", True, True)


def test_where_steps_are_scheduled_ahead_ours_does_so_too(configurations):
    schedulers = {
        platform: {told["scheduler"] for told in made if told["runner"] == "generate"}
        for platform, made in configurations.items()
    }
    assert schedulers == {
        "cpu": {"workers.vllm.plugin.scheduler.Scheduler"},
        "cuda": {"workers.vllm.plugin.scheduler.AsyncScheduler"},
    }


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_vectors_are_pooled_without_a_handover_and_what_is_known_of_a_prompt_counts(configurations, platform):
    (told,) = [told for told in configurations[platform] if told["runner"] == "pooling"]
    assert (told["device"], told["connector"], told["is_prefix_cached"]) == (platform, None, True)
    assert told["scheduler"] == "workers.vllm.plugin.scheduler.Scheduler"


def test_without_what_vllm_was_built_for_every_start_says_that_no_gpu_is_visible(told):
    answers = told("none")
    assert len(answers) == 10
    for kind, message in answers:
        assert kind == "refused"
        assert message.startswith("no GPU is visible to vLLM")
        assert "docker run --gpus all" in message
