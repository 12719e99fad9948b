"""Block names: the properties that the index, the events and the engines rely on."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire import blocks

tokens_of = st.lists(st.integers(0, 2**32 - 1), max_size=200).map(lambda ids: np.array(ids, dtype=np.uint32))
PINNED = ["0x7542e465512bc5da", "0x2dcb5df77ea6674e"]
ROOT = blocks.root("model")


@given(tokens_of, st.integers(1, 32), st.integers(0, 50))
def test_a_name_continues_from_any_block_to_the_same_names_as_in_one_go(tokens, block_size, cut):
    whole = blocks.name_blocks(tokens, block_size, ROOT)
    cut = min(cut, len(whole))
    parent = int(whole[cut - 1]) if cut else ROOT
    rest = blocks.continue_names(parent, cut, tokens[cut * block_size :], block_size)
    assert rest.tolist() == whole[cut:].tolist()


@given(tokens_of, st.integers(1, 8), st.data())
def test_changing_one_token_renames_its_block_and_all_that_follow(tokens, block_size, data):
    whole = blocks.name_blocks(tokens, block_size, ROOT)
    if not len(whole):
        return
    position = data.draw(st.integers(0, len(whole) * block_size - 1))
    changed = tokens.copy()
    changed[position] ^= 1
    names = blocks.name_blocks(changed, block_size, ROOT)
    first = position // block_size
    assert names[:first].tolist() == whole[:first].tolist()
    assert not set(names[first:].tolist()) & set(whole[first:].tolist())


def test_the_partial_last_block_has_no_name():
    assert len(blocks.name_blocks(np.arange(127, dtype=np.uint32), 64, ROOT)) == 1


def test_models_adapters_and_salts_share_no_name():
    roots = [blocks.root("a"), blocks.root("b"), blocks.root("a", "salt"), blocks.root("a", "", "salt")]
    tokens = np.arange(64, dtype=np.uint32)
    assert len({int(blocks.name_blocks(tokens, 64, root)[0]) for root in roots}) == len(roots)


def test_names_are_the_same_in_every_process_and_release():
    """Gateways and workers of different releases must agree: these values may never change."""
    tokens = np.arange(8, dtype=np.uint32)
    assert [hex(n) for n in blocks.name_blocks(tokens, 4, blocks.root("m", "s")).tolist()] == PINNED


def test_swapping_two_blocks_gives_other_names():
    tokens = np.arange(64, dtype=np.uint32)
    swapped = np.concatenate([tokens[32:], tokens[:32]])
    a, b = blocks.name_blocks(tokens, 32, ROOT), blocks.name_blocks(swapped, 32, ROOT)
    assert not set(a.tolist()) & set(b.tolist())


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_packed_names_come_back_and_their_digest_ignores_order(names):
    array = np.array(names, dtype=np.uint64)
    assert blocks.unpack(blocks.pack(array)).tolist() == names
    assert blocks.digest(array) == blocks.digest(array[::-1])


@given(st.lists(st.integers(min_value=0, max_value=9), min_size=1, max_size=8), st.integers(min_value=1, max_value=8))
def test_many_prompts_are_continued_at_once_as_each_alone(depths, block_size):
    rng = np.random.default_rng(len(depths))
    prompts = rng.integers(0, 1 << 32, (len(depths), 10 * block_size)).astype(np.uint32)
    names = [[ROOT, *blocks.name_blocks(prompt, block_size, ROOT).tolist()] for prompt in prompts]
    parents = np.array([row[depth] for row, depth in zip(names, depths, strict=True)], dtype=np.uint64)
    tails = np.array([p[d * block_size : (d + 1) * block_size] for p, d in zip(prompts, depths, strict=True)])
    continued = blocks.continue_each(parents, np.array(depths), tails)
    assert continued.tolist() == [row[depth + 1] for row, depth in zip(names, depths, strict=True)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The names as C computes them, of the source as it stands."""
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("names") / "libblock_names.so"
    source = Path(blocks.__file__).with_name("block_names.c")
    subprocess.run(
        [compiler, "-std=c99", "-Wall", "-Werror", "-fPIC", "-shared", str(source), "-o", library], check=True
    )
    return blocks.compiled_names(str(library))


@given(
    tokens_of,
    st.integers(1, 40),
    st.integers(0, 2**64 - 1),
    st.integers(0, 300),
)
def test_c_and_numpy_give_the_same_names(compiled, tokens, block_size, acc, depth):
    names = compiled(tokens, block_size, acc, depth)
    assert names.dtype == np.uint64
    assert names.tolist() == blocks.plain_names(tokens, block_size, acc, depth).tolist()


def test_tokens_of_any_layout_have_their_names(compiled):
    tokens = np.arange(128, dtype=np.uint32)
    for layout in (tokens[::2], tokens.astype(np.int64), tokens[1:]):
        assert compiled(layout, 16, 5, 0).tolist() == blocks.plain_names(layout, 16, 5, 0).tolist()


@pytest.mark.parametrize("content", [None, b"no library"])
def test_numpy_serves_where_c_is_not_there(tmp_path, content):
    if content is not None:
        (tmp_path / "lib.so").write_bytes(content)
    assert blocks.compiled_names(str(tmp_path / "lib.so")) is None
