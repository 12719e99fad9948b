"""Block names: one 64-bit hash for each full block of a prompt, which names all tokens up to the block's end.

    digest_i = mix(sum_k token_{i,k} * coefficient_k)            one multilinear hash per block
    acc_i    = root + sum_{j<=i} digest_j * position_j           all mod 2**64, position_j odd
    name_i   = mix(acc_i)

Every line is one vectorised numpy expression over all blocks, and `mix` is a bijection, so a name can be continued
(`continue_names`) from the name before it. Names steer routing only: engines compare tokens (vLLM by sha256, the sim
engine by its own chain), so a collision costs a wrong guess, never a wrong answer (`docs/adr/0004-block-names.md`).

`block_names.c` names a prompt's blocks in one call where it was compiled: two dozen calls of numpy's cost more than
what most prompts have them compute.

Source of `mix`: the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
"""

import ctypes
import hashlib
import sys
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

LIBRARY = __file__.removesuffix("blocks.py") + "libblock_names.so"
_ABI = 1

Hashes = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.uint32]

_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_M1_INVERSE, _M2_INVERSE = np.uint64(pow(int(_M1), -1, 1 << 64)), np.uint64(pow(int(_M2), -1, 1 << 64))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_1, _27, _30, _31 = np.uint64(1), np.uint64(27), np.uint64(30), np.uint64(31)  # building one takes as long as using it


def _mix(x: Hashes) -> Hashes:
    """In place: most prompts are so short that it is the number of numpy's calls that counts."""
    x ^= x >> _30
    x *= _M1
    x ^= x >> _27
    x *= _M2
    x ^= x >> _31
    return x


def _unmix(x: Hashes) -> Hashes:
    x = (x ^ (x >> np.uint64(31)) ^ (x >> np.uint64(62))) * _M2_INVERSE
    x = (x ^ (x >> np.uint64(27)) ^ (x >> np.uint64(54))) * _M1_INVERSE
    unmixed: Hashes = x ^ (x >> np.uint64(30)) ^ (x >> np.uint64(60))
    return unmixed


@lru_cache(maxsize=4096)
def _unmixed(name: int) -> int:
    """The same for one name; prompts begin at few roots."""
    return int(_unmix(np.array([name], dtype=np.uint64))[0])


@lru_cache(maxsize=64)
def _odd_multipliers(count: int, stream: int) -> Hashes:
    odd: Hashes = _mix((np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)) * _GOLDEN) | np.uint64(1)
    return odd


@lru_cache(maxsize=4096)
def root(model: str, salt: str = "", adapter: str = "") -> int:
    """The name before the first block: prompts of other models, adapters or salts share no block."""
    digest = hashlib.blake2b(f"{model}\0{adapter}\0{salt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def name_blocks(tokens: Tokens, block_size: int, root_name: int) -> Hashes:
    """Names of the full blocks of a prompt, in order; the rest of `tokens` after the last full block is ignored.

    Args:  tokens: shape (n,), uint32.  root_name: from `root`.
    Returns:  shape (n // block_size,), uint64.
    """
    return _names(tokens, block_size, _unmixed(root_name), 0)


def continue_names(parent: int, depth: int, tokens: Tokens, block_size: int) -> Hashes:
    """Names of the full blocks in `tokens`, which follow the block named `parent`, the `depth`-th from the start.

    `continue_names(root_name, 0, …)` equals `name_blocks(…, root_name)`.
    """
    return _names(tokens, block_size, _unmixed(parent), depth)


def continue_each(parents: Hashes, depths: npt.NDArray[np.int64], tokens: npt.NDArray[np.uint32]) -> Hashes:
    """One more name for each of many prompts: entry i equals `continue_names(parents[i], depths[i], tokens[i], …)[0]`.

    Args:  parents: shape (n,).  depths: shape (n,).  tokens: shape (n, block_size).
    """
    digests = _mix((tokens.astype(np.uint64) + np.uint64(1)) @ _odd_multipliers(tokens.shape[1], 1))
    positions = _odd_multipliers(_power_of_two(int(depths.max(initial=0)) + 1), 2)[depths]
    names: Hashes = _mix(_unmix(parents) + digests * positions)
    return names


Names = Callable[[Tokens, int, int, int], Hashes]
"""Args:  tokens, block size, `acc` and depth of what they follow."""


def plain_names(tokens: Tokens, block_size: int, acc: int, depth: int) -> Hashes:
    """`Names`, in numpy."""
    count = len(tokens) // block_size
    if not count:
        return np.empty(0, dtype=np.uint64)
    blocks = tokens[: count * block_size].reshape(count, block_size).astype(np.uint64)
    blocks += _1
    names = _mix(blocks @ _odd_multipliers(block_size, 1))
    names *= _odd_multipliers(_power_of_two(depth + count), 2)[depth : depth + count]
    np.add.accumulate(names, out=names)
    names += np.uint64(acc)
    return _mix(names)


def compiled_names(path: str = LIBRARY) -> Names | None:
    """`Names`, in C; None where there is no such library of this version."""
    try:
        library = ctypes.PyDLL(path)
        abi = library.names_abi()
    except (OSError, AttributeError):
        return None
    if abi != _ABI or sys.byteorder != "little":
        return None
    names_of, size, word, pointer = library.names_of, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p
    names_of.restype, names_of.argtypes = None, (ctypes.c_char_p, size, size, pointer, word, word, pointer)

    @lru_cache(maxsize=64)
    def sized(block_size: int) -> tuple[Hashes, ctypes.c_size_t, ctypes.c_void_p]:
        """The coefficients; and, ready to pass, the size and where they are."""
        found = _odd_multipliers(block_size, 1)
        return found, ctypes.c_size_t(block_size), ctypes.c_void_p(found.ctypes.data)

    def names(tokens: Tokens, block_size: int, acc: int, depth: int) -> Hashes:
        count = len(tokens) // block_size
        if not count:
            return np.empty(0, dtype=np.uint64)
        found = bytearray(8 * count)  # asking an array of numpy's where it lies takes longer than most prompts' names
        packed = tokens.astype("<u4", copy=False).tobytes()
        _kept, length, coefficients = sized(block_size)
        names_of(packed, count, length, coefficients, acc, depth, ctypes.byref(ctypes.c_char.from_buffer(found)))
        return np.frombuffer(found, dtype=np.uint64)

    return names


_names = compiled_names() or plain_names


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def pack(names: Hashes) -> bytes:
    return names.astype("<u8", copy=False).tobytes()


def unpack(packed: bytes) -> Hashes:
    """Raises:  ValueError if the length is no multiple of eight."""
    return np.frombuffer(packed, dtype="<u8")


def digest(names: Hashes) -> int:
    """XOR of all names, 0 for none: equal sets have equal digests."""
    return int(np.bitwise_xor.reduce(names)) if len(names) else 0
