"""vLLM's events become our block names: on hand-made batches, encoded as vLLM encodes them."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.blocks import name_blocks, root, unpack
from planes.wire.messages import AllCleared, BlocksRemoved, BlocksStored
from workers.vllm.events import EventTranslator, translate_all

BLOCK = 4
MODEL = "tiny"
FULL, WINDOW = 5, 0


def batch(*events):
    return msgspec.msgpack.encode([12.5, list(events), 0])


def stored(hashes, tokens, parent=None, *, group=FULL, kind="full_attention", salt=None, lora=None):
    event = {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": lora,
        "group_idx": group,
        "kv_cache_spec_kind": kind,
    }
    salts = [[salt] if salt and parent is None and i == 0 else [] for i in range(len(hashes))]
    return event | {"extra_keys": [[*([lora] if lora else []), *each] or None for each in salts]}


def removed(hashes, *, group=FULL):
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", "group_idx": group}


def names(tokens, salt="", lora=""):
    return name_blocks(np.array(tokens, dtype=np.uint32), BLOCK, root(MODEL, salt, lora)).tolist()


def names_in(event):
    return unpack(event.hashes).tolist()


def test_stored_blocks_get_the_names_that_the_gateway_computes():
    (event,) = EventTranslator(MODEL).translate(batch(stored([101, 102], list(range(8)))))
    assert isinstance(event, BlocksStored)
    assert names_in(event) == names(range(8))


def test_blocks_stored_later_continue_their_parent():
    translator = EventTranslator(MODEL)
    translator.translate(batch(stored([101, 102], list(range(8)))))
    (event,) = translator.translate(batch(stored([103], [8, 9, 10, 11], parent=102)))
    assert names_in(event) == names(range(12))[2:]


def test_a_cache_salt_gives_other_names_and_its_children_inherit_them():
    translator = EventTranslator(MODEL)
    first, second = translator.translate(
        batch(stored([201], [0, 1, 2, 3], salt="tenant"), stored([202], [4, 5, 6, 7], parent=201))
    )
    assert names_in(first) + names_in(second) == names(range(8), "tenant")


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_an_adapter_gives_other_names_with_and_without_a_salt(salt):
    translator = EventTranslator(MODEL)
    first, second = translator.translate(
        batch(
            stored([201], [0, 1, 2, 3], salt=salt, lora="poet@7"),
            stored([202], [4, 5, 6, 7], parent=201, salt=salt, lora="poet@7"),
        )
    )
    assert names_in(first) + names_in(second) == names(range(8), salt, "poet@7")


def test_only_the_first_group_with_full_attention_counts():
    translator = EventTranslator(MODEL)
    tokens = list(range(8))
    window = stored([102], tokens, group=WINDOW, kind="sliding_window")
    assert translator.translate(batch(window)) == []
    (event,) = translator.translate(batch(window, stored([101, 102], tokens), stored([101], tokens[:4], group=6)))
    assert names_in(event) == names(tokens)
    assert translator.translate(batch(removed([102], group=WINDOW))) == []
    assert translator.num_cached == 2


def test_a_block_held_twice_is_gone_when_both_copies_are():
    translator = EventTranslator(MODEL)
    translator.translate(batch(stored([101], [0, 1, 2, 3])))
    assert translator.translate(batch(stored([101], [0, 1, 2, 3]))) == []
    assert translator.translate(batch(removed([101]))) == []
    (event,) = translator.translate(batch(removed([101])))
    assert isinstance(event, BlocksRemoved)
    assert names_in(event) == names(range(4))
    assert translator.num_cached == 0


def test_children_of_an_unknown_block_and_unknown_removals_are_left_out():
    translator = EventTranslator(MODEL)
    assert translator.translate(batch(stored([103], [8, 9, 10, 11], parent=102), removed([7]))) == []


def test_a_cleared_cache_forgets_everything():
    translator = EventTranslator(MODEL)
    translator.translate(batch(stored([101], [0, 1, 2, 3])))
    assert translator.translate(batch({"type": "AllBlocksCleared"})) == [AllCleared()]
    assert translator.num_cached == 0


def test_a_partly_filled_block_has_no_name():
    assert EventTranslator(MODEL).translate(batch(stored([101], [0, 1, 2]))) == []


def test_what_vllm_never_sends_is_refused():
    with pytest.raises(msgspec.DecodeError):
        EventTranslator(MODEL).translate(batch({"type": "Surprise"}))


@given(st.lists(st.integers(0, 300), min_size=BLOCK, max_size=60), st.data())
def test_however_a_prompt_is_stored_in_parts_its_names_are_the_same(tokens, data):
    num_blocks = len(tokens) // BLOCK
    cuts = sorted(data.draw(st.sets(st.integers(1, num_blocks), max_size=4)) | {num_blocks})
    translator, start, seen = EventTranslator(MODEL), 0, []
    for end in cuts:
        parent = 1000 + start - 1 if start else None
        part = stored([1000 + i for i in range(start, end)], tokens[start * BLOCK : end * BLOCK], parent)
        for event in translator.translate(batch(part)):
            seen += names_in(event)
        start = end
    assert seen == names(tokens)


def test_hashes_may_be_bytes():
    translator = EventTranslator(MODEL)
    translator.translate(batch(stored([b"a" * 32, b"b" * 32], list(range(8)))))
    (later,) = translator.translate(batch(stored([b"c" * 32], [8, 9, 10, 11], parent=b"b" * 32)))
    assert names_in(later) == names(range(12))[2:]
    (gone,) = translator.translate(batch(removed([b"b" * 32])))
    assert names_in(gone) == names(range(8))[1:]


def test_what_is_stored_after_a_lost_batch_is_known_again():
    translator = EventTranslator(MODEL)
    before, after = (
        batch(stored([101], list(range(4)))),
        batch(stored([201], [9] * 4), stored([202], [8] * 4, parent=7)),
    )
    cleared, event = translate_all(translator, [before, None, after])
    assert isinstance(cleared, AllCleared)
    assert names_in(event) == names([9] * 4)
    for unreadable in (b"", b"\xc1", b"\x93\xcb" + bytes(8) + b"\x91" * 20_000):
        assert translate_all(EventTranslator(MODEL), [before, unreadable, after]) == [cleared, event]
    first, second = translate_all(EventTranslator(MODEL), [before, after])
    assert names_in(first) + names_in(second) == [*names(range(4)), *names([9] * 4)]
