"""A fleet of containers: it answers, and goes on when parts of it are killed, stopped and started again."""

import pytest

from tests.docker.commands import docker, wait_until
from tests.docker.conversation import Conversation, answer

EVERYBODY = ("prefill-1", "decode-1", "decode-2")
MAX_TOKENS = 400


def test_a_chat_is_streamed_and_handed_over_from_one_container_to_another(fleet):
    said = answer(fleet.url, "What is the capital of France?")
    prefill, decode = said.served_by
    assert prefill == "prefill-1"
    assert decode in ("decode-1", "decode-2")
    assert said.num_pieces > 2


@pytest.mark.parametrize("each", ["etcd", "nats", "gateway", *EVERYBODY])
def test_docker_finds_it_healthy(fleet, each):
    fleet.wait_healthy(each)


def begun(fleet, prompts):
    """Chats that have all begun, and are far from their ends."""
    chats = [Conversation(fleet.url, prompt, max_tokens=MAX_TOKENS).begin() for prompt in prompts]
    wait_until(lambda: all(chat.num_pieces > 20 or chat.error for chat in chats), lambda: [c.error for c in chats])
    return chats


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_decode_worker_that_goes_takes_no_word_of_an_answer_with_it(fleet, end):
    prompts = [f"Tell a long story about number {number}." for number in range(6)]
    undisturbed = [answer(fleet.url, prompt, max_tokens=MAX_TOKENS).text for prompt in prompts]
    chats = begun(fleet, prompts)
    gone = chats[0].served_by[1]
    if end == "kill":
        docker("kill", fleet.name(gone))
        assert fleet.exit_code(gone) == 137
    else:
        assert fleet.stop(gone) == 0, fleet.log(gone)
    assert [chat.end().text for chat in chats] == undisturbed
    assert all(chat.is_complete for chat in chats)
    docker("start", fleet.name(gone))
    fleet.wait_for(*EVERYBODY)


@pytest.mark.parametrize("each", ["etcd", "nats", "prefill-1", "decode-1", "gateway"])
def test_what_is_started_again_is_used_again(fleet, each):
    docker("restart", "--time=60", fleet.name(each))
    fleet.wait_healthy(each)
    fleet.wait_for(*EVERYBODY)
    assert answer(fleet.url, "Are you there again?").served_by[0] == "prefill-1"


def test_answers_go_on_while_the_planes_are_away(fleet):
    chats = begun(fleet, ["Tell a story that outlives the planes."])
    docker("stop", fleet.name("etcd"), fleet.name("nats"))
    assert chats[0].end().is_complete
    answer(fleet.url, "Are you there without them?")
    docker("start", fleet.name("etcd"), fleet.name("nats"))
    fleet.wait_for(*EVERYBODY)


def test_what_etcd_knows_outlives_its_container(fleet):
    def config():
        return docker("exec", fleet.name("gateway"), "headrace", "config")

    docker("exec", fleet.name("gateway"), "headrace", "config", "slo_ttft_s=2.5")
    docker("rm", "--force", fleet.name("etcd"))
    fleet.start("etcd", "headrace/etcd", options=(f"--volume={fleet.name('etcd')}:/data",))
    fleet.wait_healthy("etcd")
    assert "2.5" in config()
    fleet.wait_for(*EVERYBODY)


def test_a_gateway_that_is_stopped_ends_its_answers_first(fleet):
    chat = begun(fleet, ["Tell a story to the end."])[0]
    assert fleet.stop("gateway") == 0, fleet.log("gateway")
    assert chat.end().is_complete
    docker("start", fleet.name("gateway"))
    fleet.wait_for(*EVERYBODY)


@pytest.mark.parametrize("each", [*EVERYBODY, "gateway", "nats", "etcd"])
def test_an_idle_container_ends_well_when_it_is_stopped(fleet, each):
    assert fleet.stop(each) == 0, fleet.log(each)
