"""Dropout of attention weights: which are kept follows from (seed, batch, head, row, column) and nothing else.

Philox 4x32 with 7 rounds: key = seed, counter = (group of columns, group of rows, head, batch). A group is what a lane
has of 16 x 32 accumulators of mma.sync: a word for each 8 columns, in it a byte for each of two neighbouring columns of
two rows 8 apart. A weight is dropped where the low 7 bits of its byte are below a threshold; 8 of the bits left over
decide, for the group, between two neighbouring thresholds, so that the chance is right to 2^-15.
flash_attn_sm120/dropout.py is the same in PyTorch.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32, Uint32

from flash_attn_sm120.device.ptx import byte_permute, multiply_wide
from flash_attn_sm120.dropout import MULTIPLIERS, ROUNDS, WEYL

COLUMNS = 32  # that the groups of a warp's lanes make up
EVERY_BYTE = 0x01010101
OWN_BITS, TOP_BITS = 0x7F7F7F7F, 0x80808080 - (1 << 32)
SECOND_BITS = 0x40404040
SIGNS = (0x9988, 0xBBAA)  # for byte_permute, of each row's two bytes: their signs, 16 times each


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
    """The weights of a thread's rows in one block."""

    key: tuple[Int32, Int32]
    threshold: Int32  # of 7 bits, in each byte
    carry: Int32  # of 8 bits, as spread says: below it the threshold is one more
    batch: Int32
    head: Int32
    first_row: Int32  # of the warp, a multiple of 16
    first_col: Int32  # of the block, a multiple of its columns
    lane: Int32

    def signs(self, m: int, n_frags: int) -> list[Int32]:
        """For each 8 columns the four weights of rows 16 m to 16 m + 15: a byte's top bit is set where one stays."""
        rows = self.first_row // 2 + (8 * m + self.lane // 4)
        found = []
        for first in range(0, n_frags, COLUMNS // 8):
            group = (self.first_col // COLUMNS + first * 8 // COLUMNS) * 4 + self.lane % 4
            words = philox((group, rows, self.head, self.batch), self.key)
            drawn = words[0] & TOP_BITS | words[1] >> 1 & SECOND_BITS
            more = Uint32(drawn) < Uint32(self.carry)
            threshold = cutlass.select_(more, self.threshold + EVERY_BYTE, self.threshold)
            # a byte below the threshold borrows its top bit
            found += [(word & OWN_BITS | TOP_BITS) - threshold for word in words]
        if n_frags * 8 < COLUMNS:
            part = self.first_col % COLUMNS // 8
            found = [cutlass.select_(part == 0, found[n], found[n + n_frags]) for n in range(n_frags)]
        return found[:n_frags]

    def drop(self, tOrP: list) -> list:
        """What is left of P as update of softmax.py returns it."""
        left = [[list(pairs) for pairs in row] for row in tOrP]
        n_frags = 2 * len(tOrP[0])
        found = [self.signs(m, n_frags) for m in range(len(tOrP))]  # of all rows before the first is dropped
        for m, row in enumerate(found):
            for n, word in enumerate(row):
                for half, signs in enumerate(SIGNS):
                    place = 2 * (n % 2) + half
                    left[m][n // 2][place] = left[m][n // 2][place] & byte_permute(word, word, signs)
        return left
