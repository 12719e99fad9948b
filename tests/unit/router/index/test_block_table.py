"""The compiled table where it differs from plain masks: slots, sweeps, growth, memory. Else see test_index."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from router.index.block_masks import BlockMasks
from router.index.block_table import BlockTable, NotCompiledError, load

SOURCE = Path(__file__).parents[4] / "router" / "index" / "block_table.c"


@pytest.fixture
def table():
    try:
        return BlockTable(load())
    except NotCompiledError as exc:
        pytest.skip(str(exc))


def names(first, last):
    return np.arange(first, last, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def sweep(table):
    """Any change goes on with it."""
    while table.stats().num_retired:
        table.store("sweeper", names(0, 0))


def test_equals_plain_masks_after_any_history_of_many_workers(table):
    dice, sets = random.Random(7), BlockMasks()
    workers = [f"w{number}" for number in range(150)]  # sets of three words
    for _ in range(3000):
        worker, first = dice.choice(workers), dice.randrange(3000)
        part = names(first, first + dice.randrange(200))
        deed = dice.choices(("store", "remove", "forget"), (10, 6, 1))[0]
        for blocks in (table, sets):
            blocks.forget(worker) if deed == "forget" else getattr(blocks, deed)(worker, part)
        assert table.totals(worker) == sets.totals(worker)
        prompt = names(first, first + 50)
        assert table.match(prompt) == sets.match(prompt)
        name = int(prompt[dice.randrange(50)])
        assert [table.holds(each, name) for each in workers] == [sets.holds(each, name) for each in workers]
    for worker in workers:
        assert set(table.held(worker).tolist()) == set(sets.held(worker).tolist())
    sweep(table)
    assert table.stats().num_names == len(set().union(*(sets.held(worker).tolist() for worker in workers)))


def test_the_slots_of_departed_workers_are_used_again_after_the_sweep(table):
    for _ in range(300):
        table.store("b", names(1, 5001))
        table.forget("b")
    sweep(table)
    assert table.stats().num_names == 0
    assert table.stats().num_slots <= 70


def test_removals_in_the_middle_of_a_sweep_leave_nothing_behind(table):
    table.store("gone", names(0, 50_000))
    table.store("here", names(25_000, 75_000))
    table.forget("gone")
    for first in range(25_000, 75_000, 500):
        table.remove("here", names(first, first + 500))
        table.store("here", names(first + 100_000, first + 100_500))
    sweep(table)
    assert table.stats().num_names == table.totals("here")[0] == 50_000


def test_memory_follows_the_contents_up_and_down(table):
    empty = table.stats().num_bytes
    for first in range(0, 200_000, 500):
        table.store("w", names(first, first + 500))
        stats = table.stats()
        assert stats.num_bytes <= empty + 55 * stats.num_names
    for first in range(0, 200_000, 500):
        table.remove("w", names(first, first + 500))
        stats = table.stats()
        assert stats.num_bytes <= empty + 160 * stats.num_names
    assert table.stats().num_bytes == empty


def test_memory_of_many_different_sets_is_given_back(table):
    empty, dice = table.stats().num_bytes, random.Random(3)
    for worker in range(200):
        table.store(f"w{worker}", names(0, 4000)[np.array([dice.random() < 0.5 for _ in range(4000)])])
    assert table.stats().num_bytes <= empty + 150 * table.stats().num_names  # nearly a set for each name
    for worker in range(1, 200):
        table.forget(f"w{worker}")
    sweep(table)
    assert table.stats().num_bytes <= empty + 80 * table.stats().num_names


def test_a_match_finds_more_workers_than_there_was_room_for_at_the_start(table):
    for worker in range(1000):
        table.store(f"w{worker}", names(0, 1 + worker % 7))
    assert table.match(names(0, 9)) == {f"w{worker}": 1 + worker % 7 for worker in range(1000)}


def test_bad_arguments_are_refused_by_the_library_itself(table):
    library, address = load(), table._table
    totals = (ctypes.c_uint64 * 2)()
    table.store("w", names(0, 3))
    for slot in (1, 63, 64, 2**32 - 1):
        assert library.table_store(address, slot, b"12345678", 1, totals) == -2
        assert library.table_remove(address, slot, b"12345678", 1, totals) == -2
        assert library.table_retire(address, slot) == -2
        assert library.table_held(address, slot, 0, 0) == 0
    assert library.table_match(address, b"12345678", 1, 0, 0, 0) == -2
    assert tuple(totals) == (0, 0)


def test_a_missing_library_and_a_foreign_one_say_what_to_do(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    for name in ("gone.so", "text.so"):
        with pytest.raises(NotCompiledError, match=f"{name}: .* install it again"):
            load(str(tmp_path / name))


FAILING_CALLOC = """
#include <stdlib.h>
long calloc_left = -1;
void *failing_calloc(size_t n, size_t size) { return calloc_left && calloc_left-- ? (calloc)(n, size) : NULL; }
#define calloc(n, size) failing_calloc(n, size)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler to build the failing allocator with")
def test_nothing_is_lost_when_memory_is_short_at_any_allocation(tmp_path):
    (tmp_path / "failing.h").write_text(FAILING_CALLOC)
    built = tmp_path / "failing.so"
    flags = ["-std=c99", "-O1", "-shared", "-fPIC", "-include", str(tmp_path / "failing.h")]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(built)], check=True)
    library = load(str(built))
    left = ctypes.c_long.in_dll(library, "calloc_left")

    def history(blocks):
        """Grows, gets a second word and many sets, shrinks; each step may be done twice."""
        for number in range(70):
            yield blocks.store, f"w{number}", names(number * 13, number * 13 + 400 + 7 * number)
        for number in range(70):
            yield blocks.remove, f"w{number}", names(number * 13, number * 13 + 380)
        for number in range(10, 70):
            yield blocks.store, "w0", names(number, 2 * number)

    num_failed = 0
    for budget in range(25):
        left.value = -1
        table, sets = BlockTable(library), BlockMasks()
        left.value = budget
        for (change, worker, part), (expected, _, _) in zip(history(table), history(sets), strict=True):
            expected(worker, part)
            try:
                change(worker, part)
            except MemoryError:
                num_failed += 1
                left.value = -1
                change(worker, part)
                left.value = budget
            assert table.totals(worker) == sets.totals(worker)
        left.value = -1
        for number in range(70):
            assert set(table.held(f"w{number}").tolist()) == set(sets.held(f"w{number}").tolist())
    assert num_failed > 20
    left.value = 0
    with pytest.raises(MemoryError):
        BlockTable(library)
    left.value = -1
