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
    """The weights of a thread's rows in one block. threshold: in each half of the word, of a weight's number."""

    key: tuple[Int32, Int32]
    threshold: Int32
    batch: Int32
    head: Int32
    rows: list[Int32]  # 8 apart
    first_col: Int32  # of the block, a multiple of its columns
    quad: Int32  # of the lane

    def signs(self, r: int, n_frags: int) -> list[Int32]:
        """For each 8 columns the pair of row r: the top bit of a half is set where the weight is kept."""
        words = []
        for first in range(0, n_frags, COLUMNS // 8):
            group = (self.first_col // COLUMNS + first * 8 // COLUMNS) * 4 + self.quad
            words += philox((group, self.rows[r], self.head, self.batch), self.key)
        if n_frags * 8 < COLUMNS:
            part = self.first_col % COLUMNS // 8
            words = [cutlass.select_(part == 0, words[n], words[n + n_frags]) for n in range(n_frags)]
        # a half below the threshold borrows its top bit
        return [(word & OWN_BITS | TOP_BITS) - self.threshold for word in words[:n_frags]]

    def kept(self, n_frags: int) -> Kept:
        return Kept([self.signs(r, n_frags) for r in range(len(self.rows))])

    def kept_in_bits(self, n_frags: int) -> KeptInBits:
        """The same in a 16th of the registers: two rows of 64 columns in a word."""
        words = []
        for r in range(len(self.rows)):
            for n, sign in enumerate(self.signs(r, n_frags)):
                index, place = divmod(r * n_frags + n, 16)
                bits = sign >> (15 - place) & 0x10001 << place
                words[index:] = [words[index] | bits if place else bits]
        return KeptInBits(words, n_frags)


@dataclass(frozen=True)
class Kept:
    """Which pairs of a block are kept, as signs of their halves: of row r, signs[r]."""

    signs: list[list[Int32]]

    def sign(self, r: int, n: int) -> Int32:
        return self.signs[r][n]

    def drop(self, tOrP: list) -> list:
        """What is left of P as update of softmax.py returns it."""
        left = [[list(pairs) for pairs in row] for row in tOrP]
        for r in range(2 * len(left)):
            m, half = r // 2, r % 2
            for n in range(2 * len(left[m])):
                place, sign = 2 * (n % 2) + half, self.sign(r, n)
                left[m][n // 2][place] = left[m][n // 2][place] & byte_permute(sign, sign, SIGNS)
        return left


@dataclass(frozen=True)
class KeptInBits(Kept):
    """Bit j of a half of signs[i]: pair 16 i + j, row after row."""

    n_frags: int

    def sign(self, r: int, n: int) -> Int32:
        index, place = divmod(r * self.n_frags + n, 16)
        return self.signs[index] << (15 - place)
