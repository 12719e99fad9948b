"""Which workers hold which blocks, compiled: `block_table.c` behind the interface of `block_masks`.

The library is plain C without Python's headers, so one build serves every Python; `hatch_build.py` compiles it where a
C compiler is found. Names are copied into `bytes` on the way, whose length is what the C side is told, and it checks
slots and room itself. It runs with the GIL held. Loading it is an import by another name, and the router's only one.
"""

import ctypes
import sys
import weakref
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planes.wire.blocks import Hashes
from planes.wire.messages import WorkerId

LIBRARY = __file__.removesuffix("block_table.py") + "libblock_table.so"
_ABI = 2
_FEWEST = 64  # slots there is room for at the start

_Totals = ctypes.c_uint64 * 2


class NotCompiledError(Exception):
    """The compiled table cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class TableStats:
    """num_names: those of forgotten workers that wait for the sweep included.  num_slots: live or not yet swept."""

    num_names: int
    num_slots: int
    num_retired: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Slot:
    number: ctypes.c_uint32
    totals: "ctypes.Array[ctypes.c_uint64]"


@lru_cache
def load(path: str = LIBRARY) -> ctypes.PyDLL:
    """The library with its prototypes.  Raises:  NotCompiledError if it is missing or of another version."""
    if sys.byteorder != "little":
        raise NotCompiledError("the block table needs a little-endian machine")
    try:
        library = ctypes.PyDLL(path)
        abi = library.table_abi()
    except (OSError, AttributeError) as exc:
        raise NotCompiledError(
            f"{exc}; Headrace was installed without a C compiler: install it again with one"
        ) from exc
    if abi != _ABI:
        raise NotCompiledError(f"{path} is of version {abi}, not {_ABI}: install Headrace again")
    table, size, slot, pointer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_void_p
    library.table_new.restype, library.table_new.argtypes = table, ()
    library.table_free.restype, library.table_free.argtypes = None, (table,)
    library.table_claim.argtypes = (table,)
    library.table_retire.argtypes = (table, slot)
    library.table_store.argtypes = (table, slot, ctypes.c_char_p, size, _Totals)
    library.table_remove.argtypes = (table, slot, ctypes.c_char_p, size, _Totals)
    library.table_match.argtypes = (table, ctypes.c_char_p, size, pointer, pointer, size)
    library.table_holds.argtypes = (table, slot, ctypes.c_uint64)
    library.table_held.restype, library.table_held.argtypes = size, (table, slot, pointer, size)
    library.table_stats.restype, library.table_stats.argtypes = None, (table, pointer)
    return library


class BlockTable:
    """Blocks of all workers; a worker that was never heard of holds none.

    `store` and `remove` raise MemoryError where there is none; names before that are taken in and counted.
    """

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._library = library
        self._table = ctypes.c_void_p(library.table_new())  # what is converted already is quicker to pass
        if not self._table:
            raise MemoryError
        self._close = weakref.finalize(self, library.table_free, self._table)
        self._slots: dict[WorkerId, _Slot] = {}
        self._owners: list[WorkerId] = []
        self._make_room(_FEWEST)

    def store(self, worker: WorkerId, names: Hashes) -> None:
        slot, packed = self._slot(worker), names.tobytes()
        _check(self._library.table_store(self._table, slot.number, packed, len(packed) // 8, slot.totals))

    def remove(self, worker: WorkerId, names: Hashes) -> None:
        slot, packed = self._slot(worker), names.tobytes()
        _check(self._library.table_remove(self._table, slot.number, packed, len(packed) // 8, slot.totals))

    def forget(self, worker: WorkerId) -> None:
        slot = self._slots.pop(worker, None)
        if slot is not None:
            _check(self._library.table_retire(self._table, slot.number))

    def totals(self, worker: WorkerId) -> tuple[int, int]:
        """How many blocks a worker holds, and the XOR of their names."""
        slot = self._slots.get(worker)
        return (slot.totals[0], slot.totals[1]) if slot is not None else (0, 0)

    def match(self, names: Hashes) -> dict[WorkerId, int]:
        """How many leading names each worker holds, without a hole; workers with none are left out."""
        packed = names.tobytes()
        found = self._library.table_match(self._table, packed, len(packed) // 8, *self._room)
        if not found:
            return {}
        _check(found)
        owners = map(self._owners.__getitem__, self._found[:found])
        return dict(zip(owners, self._depths[:found], strict=True))

    def holds(self, worker: WorkerId, name: int) -> bool:
        """Whether the worker holds a block, whatever lies before it."""
        slot = self._slots.get(worker)
        return slot is not None and bool(self._library.table_holds(self._table, slot.number, name))

    def held(self, worker: WorkerId) -> Hashes:
        """Every block of one worker, in no order; walks the whole table (tests and diagnosis)."""
        slot = self._slots.get(worker)
        names = np.empty(slot.totals[0] if slot is not None else 0, dtype=np.uint64)
        if slot is not None:
            self._library.table_held(self._table, slot.number, names.ctypes.data, len(names))
        return names

    def stats(self) -> TableStats:
        numbers = (ctypes.c_uint64 * 4)()
        self._library.table_stats(self._table, ctypes.addressof(numbers))
        return TableStats(*numbers)

    def _slot(self, worker: WorkerId) -> _Slot:
        slot = self._slots.get(worker)
        if slot is None:
            number = _check(self._library.table_claim(self._table))
            if number == len(self._owners):
                self._owners.append(worker)
            if number == len(self._found):
                self._make_room(2 * number)
            self._owners[number] = worker
            slot = self._slots[worker] = _Slot(ctypes.c_uint32(number), _Totals())
        return slot

    def _make_room(self, slots: int) -> None:
        """For the answer of a match: slots, and how deep each."""
        array = ctypes.c_uint32 * slots
        self._found, self._depths = array(), array()
        self._room = (ctypes.byref(self._found), ctypes.byref(self._depths), ctypes.c_size_t(slots))


def _check(status: int) -> int:
    if status == -1:
        raise MemoryError
    if status < 0:
        raise ValueError(f"the block table refused an argument ({status})")
    return status
