"""The memory of a simulated KV cache."""

from collections.abc import Sequence

import numpy as np

from planes.wire.blocks import Hashes


class KvPool:
    """Simulated KV bytes, `num_blocks` times `bytes_per_block`; the first 8 of each block say what it holds."""

    def __init__(self, num_blocks: int, bytes_per_block: int) -> None:
        """Raises:  ValueError unless `bytes_per_block` is a positive multiple of 8."""
        if bytes_per_block < 8 or bytes_per_block % 8:
            raise ValueError(f"bytes_per_block is {bytes_per_block}; a positive multiple of 8 is needed")
        self.num_blocks = num_blocks
        self.bytes_per_block = bytes_per_block
        self.data = np.zeros((num_blocks, bytes_per_block // 8), dtype="<u8")

    def write(self, blocks: Sequence[int], words: Hashes) -> None:
        self.data[blocks, 0] = words

    def read(self, blocks: Sequence[int]) -> Hashes:
        words: Hashes = self.data[blocks, 0]
        return words
