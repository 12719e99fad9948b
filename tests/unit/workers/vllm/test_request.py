"""What vLLM gets to see of a request, and what it never may."""

import dataclasses

import msgspec
import numpy as np
import pytest

from planes.wire.errors import InvalidRequest
from planes.wire.frames import DecodeLeg, LocalLeg, Parsing, PrefillLeg, Sampling, Ticket
from planes.wire.messages import HandoverEndpoint, HandoverMode, RequestId, WorkerId
from workers.engine.base import EngineRequest
from workers.vllm.request import (
    RESUME,
    KvGroup,
    PullParams,
    TicketTooOld,
    handover_params,
    reasoning_arguments,
    sampling_arguments,
    usable_lease_s,
    write_ticket,
)

BLOCK = 4
GROUPS = [KvGroup(block_bytes=64, block_size=BLOCK, window=0), KvGroup(block_bytes=64, block_size=BLOCK, window=6)]
WRITTEN_AT = 1000.0
N = 18  # five blocks, of which the window hands over three
FROM_VLLM = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": ([3, 4, 5, 6, 7], [5, 6, 7]),
    "remote_engine_id": "p-1",
    "remote_request_id": "r-0a1b2c3d",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": N,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
    "remote_prefill_cached_tokens": 4,
}


def request(leg=None, *, num_tokens=N, resume=(), **sampling):
    return EngineRequest(
        RequestId("r"),
        np.arange(num_tokens, dtype=np.uint32),
        Sampling(**({"max_tokens": 8, "temperature": 0.0} | sampling)),
        leg or LocalLeg(),
        tuple(resume),
    )


def ticket(**changes):
    good = write_ticket(WorkerId("p"), FROM_VLLM, lease_s=30, cached_tokens=4, now=WRITTEN_AT)
    params = msgspec.msgpack.decode(good.params) | changes
    return msgspec.structs.replace(good, params=msgspec.msgpack.encode(params))


def decode(the_ticket, *, now=WRITTEN_AT + 1, mode=HandoverMode.PULL, **more):
    return handover_params(request(DecodeLeg(ticket=the_ticket), **more), mode, GROUPS, now=now)


def arguments_of(the_request, eos):
    return sampling_arguments(the_request, eos, handover=None)


def test_a_ticket_gives_the_decode_engine_what_the_prefill_engine_said():
    params = decode(ticket())
    expected = {name: value for name, value in FROM_VLLM.items() if name != "remote_blocks_expiry_time"}
    assert params == expected | {"remote_block_ids": [[3, 4, 5, 6, 7], [5, 6, 7]]}
    assert ticket().num_tokens == N
    assert ticket().cached_tokens == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"remote_block_ids": []},
        {"remote_block_ids": [[], []]},
        {"remote_block_ids": [[3, 4, 5, 6, 7]]},
        {"remote_block_ids": [[3, 4, 5, 6], [5, 6, 7]]},
        {"remote_block_ids": [[3, 4, 5, 6, -1], [5, 6, 7]]},
        {"remote_block_ids": [[3, 4, 5, 6, "7"], [5, 6, 7]]},
        {"remote_block_ids": None},
        {"remote_port": 0},
        {"remote_port": 70000},
        {"remote_host": ""},
        {"remote_engine_id": 7},
        {"remote_request_id": None},
        {"tp_size": 0},
        {"remote_num_tokens": N - 1},
        {"surprise": 1},
    ],
)
def test_malformed_handover_parameters_never_reach_vllm(changes):
    with pytest.raises(InvalidRequest) as caught:
        decode(ticket(**changes))
    assert caught.value.code == "malformed_handover"


@pytest.mark.parametrize("params", [b"", b"\xc1", msgspec.msgpack.encode([1]), msgspec.msgpack.encode({})])
def test_params_that_are_no_params_are_refused(params):
    with pytest.raises(InvalidRequest):
        decode(msgspec.structs.replace(ticket(), params=params))


def test_a_ticket_for_another_prompt_is_refused():
    with pytest.raises(InvalidRequest, match=r"18 tokens .* the prompt has 17"):
        decode(ticket(), num_tokens=17)


def test_a_ticket_is_good_for_its_lease_and_no_longer():
    lease_s = usable_lease_s(30)
    assert ticket().lease_s == lease_s == 24.0
    assert decode(ticket(), now=WRITTEN_AT + lease_s)
    with pytest.raises(TicketTooOld):
        decode(ticket(), now=WRITTEN_AT + lease_s + 0.1)


@pytest.mark.parametrize("num_tokens", [18, 20])
def test_the_first_token_may_be_resumed_where_a_block_ends_too(num_tokens):
    said = FROM_VLLM | {"remote_num_tokens": num_tokens}
    whole = write_ticket(WorkerId("p"), said, lease_s=30, cached_tokens=0, now=WRITTEN_AT)
    assert decode(whole, num_tokens=num_tokens)
    assert decode(whole, num_tokens=num_tokens, resume=[7])
    with pytest.raises(InvalidRequest, match="at most 1 token"):
        decode(whole, num_tokens=num_tokens, resume=[7, 8])


def test_a_leg_of_the_other_mode_and_several_choices_are_refused():
    with pytest.raises(InvalidRequest, match="this engine's is push"):
        decode(ticket(), mode=HandoverMode.PUSH)
    with pytest.raises(InvalidRequest, match="this engine's is none"):
        handover_params(request(PrefillLeg(HandoverMode.PULL)), None, GROUPS, now=0.0)
    with pytest.raises(InvalidRequest, match="only n = 1"):
        decode(ticket(), n=2)
    with pytest.raises(InvalidRequest, match="a ticket or a source"):
        handover_params(request(DecodeLeg()), HandoverMode.PULL, GROUPS, now=0.0)


def test_a_prefill_leg_asks_for_a_handover_unless_its_one_token_is_all():
    leg = PrefillLeg(HandoverMode.PULL)
    params = handover_params(request(leg), HandoverMode.PULL, GROUPS, now=0.0)
    assert params == {"do_remote_decode": True, "do_remote_prefill": False}
    assert handover_params(request(leg, max_tokens=1), HandoverMode.PULL, GROUPS, now=0.0) is None
    pushing = request(PrefillLeg(HandoverMode.PUSH), max_tokens=1)
    assert handover_params(pushing, HandoverMode.PUSH, GROUPS, now=0.0) == params
    assert handover_params(request(), HandoverMode.PULL, GROUPS, now=0.0) is None
    assert arguments_of(request(leg, min_tokens=5), [1])["max_tokens"] == 1
    assert arguments_of(request(leg, min_tokens=5), [1])["min_tokens"] == 1


def test_a_push_source_becomes_the_parameters_that_vllm_reads():
    source = HandoverEndpoint(HandoverMode.PUSH, "p-1", "10.0.0.1", 5600, tp_size=2)
    params = handover_params(request(DecodeLeg(source=source)), HandoverMode.PUSH, GROUPS, now=0.0)
    assert params == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "p-1",
        "remote_request_id": "r",
        "remote_host": "10.0.0.1",
        "remote_port": 5600,
        "tp_size": 2,
        "pp_size": 1,
    }
    nowhere = msgspec.structs.replace(source, port=0)
    with pytest.raises(InvalidRequest, match="no endpoint"):
        handover_params(request(DecodeLeg(source=nowhere)), HandoverMode.PUSH, GROUPS, now=0.0)


def test_resumed_tokens_travel_beside_the_prompt_and_limits_count_them():
    arguments = arguments_of(request(resume=[5, 6], min_tokens=3), [])
    assert (arguments["max_tokens"], arguments["min_tokens"]) == (8, 3)
    assert arguments["extra_args"] == {RESUME: [5, 6]}
    with_ticket = sampling_arguments(request(resume=[5]), [], handover={"do_remote_prefill": True})
    assert with_ticket["extra_args"] == {RESUME: [5], "kv_transfer_params": {"do_remote_prefill": True}}
    assert arguments_of(request(), [])["extra_args"] is None


def test_eos_is_a_stop_token_and_stop_strings_are_not_the_engine_s():
    arguments = arguments_of(request(stop_token_ids=[9], stop=["x"]), [1, 2])
    assert arguments["stop_token_ids"] == [1, 2, 9]
    assert "stop" not in arguments
    assert arguments_of(request(ignore_eos=True), [1, 2])["stop_token_ids"] == []


def test_prompt_logprobs_are_not_computed_again_for_a_resumed_answer():
    assert arguments_of(request(prompt_logprobs=2), [])["prompt_logprobs"] == 2
    assert arguments_of(request(prompt_logprobs=2, resume=[5]), [])["prompt_logprobs"] is None


def test_a_grammar_waits_for_the_end_of_reasoning_if_the_answer_has_any():
    assert reasoning_arguments(request()) == {"reasoning_ended": True}
    no_reasoning = dataclasses.replace(request(), parsing=Parsing())
    assert reasoning_arguments(no_reasoning) == {"reasoning_ended": True}
    thinking = Parsing(has_reasoning=True, template_kwargs=b'{"enable_thinking": true}')
    assert reasoning_arguments(dataclasses.replace(request(), parsing=thinking)) == {
        "reasoning_parser_kwargs": {"chat_template_kwargs": {"enable_thinking": True}}
    }


def test_a_prefill_leg_whose_token_is_drawn_again_ends_by_length_whatever_it_draws():
    leg = PrefillLeg(HandoverMode.PULL)
    arguments = arguments_of(request(leg, temperature=1.0, stop_token_ids=[9]), [1, 2])
    assert (arguments["stop_token_ids"], arguments["ignore_eos"], arguments["max_tokens"]) == ([], True, 1)


@pytest.mark.parametrize(
    "first_draw_counts",
    [
        {"leg": PrefillLeg(HandoverMode.PULL)},
        {"leg": PrefillLeg(HandoverMode.PULL), "temperature": 1.0, "seed": 7},
        {"leg": PrefillLeg(HandoverMode.PULL), "temperature": 1.0, "max_tokens": 1},
        {"leg": PrefillLeg(HandoverMode.PULL, emit_first=True), "temperature": 1.0},
        {"temperature": 1.0},
    ],
)
def test_a_token_that_is_not_drawn_again_may_end_the_answer(first_draw_counts):
    arguments = arguments_of(request(**first_draw_counts, stop_token_ids=[9]), [1, 2])
    assert (arguments["stop_token_ids"], arguments["ignore_eos"]) == ([1, 2, 9], False)


def test_greedy_choices_are_computed_once():
    assert arguments_of(request(n=3), [])["n"] == 1
    assert arguments_of(request(n=3, temperature=0.7), [])["n"] == 3


def test_what_vllm_newly_leaves_out_is_noticed_when_the_ticket_is_written():
    with pytest.raises(msgspec.ValidationError):
        write_ticket(WorkerId("p"), {"remote_host": "x"}, lease_s=30, cached_tokens=0, now=0.0)
    assert isinstance(ticket(), Ticket)
    assert "written_at" in PullParams.__struct_fields__
