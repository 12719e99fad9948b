"""Block pools and tickets, as far as they need no peer; handovers themselves are in tests/integration."""

import msgspec
import numpy as np
import pytest

from planes.wire.errors import InvalidRequest
from planes.wire.messages import HandoverMode
from workers.sim.counting_transfer import CountingTransfer
from workers.sim.handover import Offer
from workers.sim.kv_pool import KvPool
from workers.sim.side_channel import Peer


@pytest.fixture
def transfer():
    return CountingTransfer(KvPool(8, 16), mode=HandoverMode.PULL, engine_id="e", host="127.0.0.1")


def offer(**changes):
    values = {
        "engine_id": "other",
        "host": "127.0.0.1",
        "port": 1,
        "request": "r",
        "blocks": np.array([3, 4], dtype="<u4").tobytes(),
        "bytes_per_block": 16,
        "words": bytes(16),
    }
    return msgspec.msgpack.encode(Offer(**(values | changes)))


@pytest.mark.parametrize("size", [0, 4, 12, -8])
def test_a_block_has_a_positive_multiple_of_eight_bytes(size):
    with pytest.raises(ValueError, match=f"bytes_per_block is {size}"):
        KvPool(4, size)


def test_a_pool_keeps_a_word_at_the_start_of_each_block():
    pool = KvPool(4, 24)
    pool.write([2, 0], np.array([7, 8], dtype=np.uint64))
    assert pool.read([0, 1, 2]).tolist() == [8, 0, 7]
    assert pool.data.tobytes()[48:56] == (7).to_bytes(8, "little")


def test_params_come_back_as_the_offer_they_were(transfer):
    parsed = transfer.parse(transfer.offer("r", [5, 1], lambda: None))
    assert (parsed.engine_id, parsed.request, parsed.num_blocks) == ("e", "r", 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (offer()[:-1], "malformed"),
        (offer(blocks=b""), "names its blocks in 0 bytes"),
        (offer(blocks=b"12345"), "names its blocks in 5 bytes"),
        (offer(bytes_per_block=32), "32 bytes; ours have 16"),
        (offer(words=b"", peer=Peer(b"", 0, 8)), "NIXL, which is not installed here"),
    ],
)
def test_params_of_nobody_like_us_are_refused(transfer, params, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        transfer.parse(params)
    assert caught.value.param == "ticket"


def test_what_is_withdrawn_is_not_taken_any_more(transfer):
    taken = []
    transfer.offer("r", [5], lambda: taken.append("r"))
    assert transfer.withdraw("r")
    assert transfer.withdraw("r")
    transfer._done("r")
    assert taken == []
