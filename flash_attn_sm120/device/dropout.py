"""Dropout of attention weights: which are kept follows from (seed, batch, head, row, column) and nothing else.

Philox 4x32 with 7 rounds: key = seed, counter = (group of columns, row, head, batch). A group is eight columns of 32:
two neighbours of each 8, as a lane of an mma.sync accumulator has them; each has 15 bits of the four words.
flash_attn_sm120/dropout.py is the same in PyTorch.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32

from flash_attn_sm120.device.ptx import byte_permute, multiply_wide
from flash_attn_sm120.dropout import MULTIPLIERS, ROUNDS, WEYL

COLUMNS = 32  # that the groups of a counter's first word share
OWN_BITS, TOP_BITS = 0x7FFF7FFF, 0x80008000 - (1 << 32)
SIGNS = 0xBB99  # for byte_permute: the sign of each 16-bit half, 16 times


def philox(counter: tuple[Int32, Int32, Int32, Int32], key: tuple[Int32, Int32]) -> tuple[Int32, Int32, Int32, Int32]:
    for turn in range(ROUNDS):
        high_0, low_0 = multiply_wide(counter[0], MULTIPLIERS[0])
        high_1, low_1 = multiply_wide(counter[2], MULTIPLIERS[1])
        keys = [word + _signed(turn * step) for word, step in zip(key, WEYL, strict=True)]
        counter = (high_1 ^ counter[1] ^ keys[0], low_1, high_0 ^ counter[3] ^ keys[1], low_0)
    return counter


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (value >> 31 << 32)


@dataclass(frozen=True)
class Dropper:
    """The weights of a thread's rows in one block. thresholds: twice the 16-bit number of numbers that drop."""

    key: tuple[Int32, Int32]
    thresholds: Int32
    batch: Int32
    head: Int32
    rows: list[Int32]  # 8 apart
    first_col: Int32  # of the block, a multiple of its columns
    quad: Int32  # of the lane

    def drop(self, tOrP: list) -> list:
        """What is left of P as update of softmax.py returns it."""
        left = [[list(pairs) for pairs in row] for row in tOrP]
        for r in range(len(self.rows)):
            m, half = r // 2, r % 2
            for n, mask in enumerate(self.kept(r, 2 * len(left[m]))):
                place = 2 * (n % 2) + half
                left[m][n // 2][place] = left[m][n // 2][place] & mask
        return left

    def kept(self, r: int, n_frags: int) -> list[Int32]:
        """Masks of the packed pairs of row r, one for each eighth of columns."""
        words = []
        for first in range(0, n_frags, COLUMNS // 8):
            group = (self.first_col // COLUMNS + first * 8 // COLUMNS) * 4 + self.quad
            words += philox((group, self.rows[r], self.head, self.batch), self.key)
        if n_frags * 8 < COLUMNS:
            part = self.first_col % COLUMNS // 8
            words = [cutlass.select_(part == 0, words[n], words[n + n_frags]) for n in range(n_frags)]
        return [self._mask(word) for word in words[:n_frags]]

    def _mask(self, word: Int32) -> Int32:
        """Bits of the halves whose number isn't below the threshold: subtracting leaves the top bit set there."""
        left = (word & OWN_BITS | TOP_BITS) - self.thresholds
        return byte_permute(left, left, SIGNS)
