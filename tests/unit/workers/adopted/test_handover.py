"""Tickets between adopted servers."""

import msgspec
import numpy as np
import pytest

from planes.wire.errors import InvalidRequest
from planes.wire.frames import DecodeLeg, LocalLeg, PrefillLeg, Sampling
from planes.wire.messages import HandoverEndpoint, HandoverMode, RequestId, WorkerId
from tests.unit.workers.adopted.vllm_server import KEPT
from workers.adopted.handover import TicketParams, transfer_params, write_ticket
from workers.engine.base import EngineRequest
from workers.vllm.request import TicketTooOld

NOW = 1000.0
N = 32
BLOCK = 4


def ticket(now=NOW, **changes):
    return write_ticket(WorkerId("p"), KEPT | changes, lease_s=30, now=now)


def request(leg, *, num_tokens=N, resume=(), **sampling):
    prompt = np.arange(num_tokens, dtype=np.uint32)
    return EngineRequest(RequestId("r"), prompt, Sampling(**({"max_tokens": 8} | sampling)), leg, resume)


def params(asked, *, num_groups=1, can_hand_over=True, now=NOW):
    return transfer_params(asked, block_size=BLOCK, num_groups=num_groups, can_hand_over=can_hand_over, now=now)


def test_a_local_request_moves_no_kv_cache():
    assert params(request(LocalLeg())) is None


def test_a_prefill_leg_asks_the_server_to_keep_the_blocks():
    leg = PrefillLeg(HandoverMode.PULL)
    assert params(request(leg)) == {"do_remote_decode": True, "do_remote_prefill": False}
    assert params(request(leg, max_tokens=1)) is None


def test_a_decode_leg_tells_its_server_what_the_other_one_said_new_words_included():
    told = params(request(DecodeLeg(ticket(new_in_0_33=[1, 2]))))
    assert told == KEPT | {"new_in_0_33": [1, 2]}


def test_a_ticket_is_for_the_prompt_and_usable_for_the_lease_less_what_a_heartbeat_takes():
    given = ticket()
    assert (given.worker, given.mode, given.num_tokens, given.lease_s) == ("p", HandoverMode.PULL, N, 24.0)
    with pytest.raises(TicketTooOld):
        params(request(DecodeLeg(given)), now=NOW + 25)


@pytest.mark.parametrize("missing", ["remote_block_ids", "remote_host", "remote_request_id", "remote_num_tokens"])
def test_no_ticket_is_written_of_half_an_answer(missing):
    with pytest.raises(msgspec.ValidationError):
        write_ticket(WorkerId("p"), {k: v for k, v in KEPT.items() if k != missing}, lease_s=30, now=NOW)


def broken(**changes):
    packed = msgspec.msgpack.encode(TicketParams(NOW, KEPT | changes))
    return msgspec.structs.replace(ticket(), params=packed)


@pytest.mark.parametrize(
    "asked",
    [
        request(DecodeLeg(broken(remote_block_ids=[]))),
        request(DecodeLeg(broken(remote_block_ids=[[]]))),
        request(DecodeLeg(broken(remote_block_ids=[[1, 2, 3]]))),
        request(DecodeLeg(broken(remote_block_ids=[list(range(1, 10))]))),
        request(DecodeLeg(broken(remote_block_ids=[[1], list(range(8))]))),
        request(DecodeLeg(broken(remote_num_tokens=31))),
        request(DecodeLeg(broken(transfer_mode="push"))),
        request(DecodeLeg(broken(remote_port=0))),
        request(DecodeLeg(msgspec.structs.replace(ticket(), params=b"\xc1"))),
        request(DecodeLeg(ticket()), num_tokens=33),
        request(DecodeLeg(ticket()), resume=(1, 2)),
        request(DecodeLeg(ticket()), n=2),
        request(DecodeLeg(source=HandoverEndpoint(HandoverMode.PUSH, "e", "h", 1))),
        request(PrefillLeg(HandoverMode.PUSH)),
        request(PrefillLeg(HandoverMode.PULL), resume=(1,)),
    ],
)
def test_what_could_harm_an_engine_does_not_reach_it(asked):
    with pytest.raises(InvalidRequest) as refused:
        params(asked)
    assert refused.value.code == "malformed_handover"


def test_a_server_without_a_connector_hands_nothing_over():
    with pytest.raises(InvalidRequest):
        params(request(PrefillLeg(HandoverMode.PULL)), can_hand_over=False)
