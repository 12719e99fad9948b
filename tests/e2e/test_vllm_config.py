"""vLLM takes every configuration that a worker can ask it for. No GPU is needed to find that out."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from planes.wire.messages import HandoverMode, Role

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DRIVER = Path(__file__).parent / "config_driver.py"
ROOT = DRIVER.parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory, demo_model):
    """Tells what the driver says of a platform."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm"))}

    def ask(platform):
        command = [sys.executable, str(DRIVER), platform, str(demo_model)]
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
    assert {told["context"] for told in made} == {2048}
    assert {told["buffer"] for told in made if told["handover"]} == {platform}
    connectors = {"pull": "NixlPullConnector", "push": "NixlPushConnector", None: None}
    assert all(told["connector"] == connectors[told["handover"]] for told in made)


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
