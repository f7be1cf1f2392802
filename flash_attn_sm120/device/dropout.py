"""Dropout of attention weights: which are kept follows from (seed, batch, head, row, column) and nothing else.

Philox 4x32 with 7 rounds: key = seed, counter = (group of columns, group of rows, head, batch). A group is what a lane
has of 32 x 32 accumulators of mma.sync. Bit j of each random word belongs to weight j of the group, so that all 32 are
compared with the threshold at once, a bit of their numbers at a time. flash_attn_sm120/dropout.py says what a number
consists of, and is the same in PyTorch.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import cutlass
from cutlass import Int32, Uint32

from flash_attn_sm120.arguments import Dropout
from flash_attn_sm120.device.ptx import (
    byte_permute,
    multiply_wide,
    rotate_left,
    subtract_bits,
    thread_anew,
)
from flash_attn_sm120.dropout import MIX, MULTIPLIERS, OWN_BITS, ROTATIONS, ROUNDS, TAILS, WEYL

SIDE = 32  # rows and columns that the groups of a warp's lanes make up
N_FRAGS = SIDE // 8
SIGNS = (0xAA88, 0xBB99)  # for byte_permute, of each row half's two bytes: their signs, 16 times each


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (value >> 31 << 32)


def round_keys(seed: tuple[Int32, Int32]) -> list[list[Int32]]:
    """Of each round."""
    return [[word + _signed(turn * step) for word, step in zip(seed, WEYL, strict=True)] for turn in range(ROUNDS)]


def common_part(keys: list, row: Int32, head: Int32, batch: Int32) -> tuple:
    """Of the first two rounds, what doesn't depend on the column; for first_rounds."""
    high_1, low_1 = multiply_wide(head, MULTIPLIERS[1])
    high_0, low_0 = multiply_wide(high_1 ^ row ^ keys[0][0], MULTIPLIERS[0])
    return batch ^ keys[0][1], low_1 ^ keys[1][0], high_0 ^ keys[1][1], low_0


def first_rounds(col: Int32, common: tuple) -> tuple:
    """The state after two rounds."""
    high_0, low_0 = multiply_wide(col, MULTIPLIERS[0])
    high_1, low_1 = multiply_wide(high_0 ^ common[0], MULTIPLIERS[1])
    return high_1 ^ common[1], low_1, common[2] ^ low_0, common[3]


def draw(keys: list, common: tuple, chance: tuple[Int32, Int32], cols: list[Int32]) -> list[Int32]:
    """Of each column's group: a bit is set where the weight is dropped. Side by side, as each waits for itself."""
    states = [first_rounds(col, common) for col in cols]
    for own in keys[2:]:
        states = [philox_round(state, own) for state in states]
    threshold, carry = chance
    bits = [-(threshold >> i & 1) for i in range(OWN_BITS)]  # each in all places of a word; no lane's own
    return [compare(state, bits, carry) for state in states]


def philox_round(counter: tuple, keys: list[Int32]) -> tuple:
    high_0, low_0 = multiply_wide(counter[0], MULTIPLIERS[0])
    high_1, low_1 = multiply_wide(counter[2], MULTIPLIERS[1])
    return high_1 ^ counter[1] ^ keys[0], low_1, high_0 ^ counter[3] ^ keys[1], low_0


def compare(words: tuple, threshold: list[Int32], carry: Int32) -> Int32:
    """Which of a group's numbers are below the threshold, or below one more where the group's own number is below the
    carry: a subtraction from the lowest bit up, of which only the borrow is kept."""
    less = cutlass.select_(Uint32(words[2] * _signed(MIX) + words[3]) < Uint32(carry), Int32(-1), Int32(0))
    turned = [rotate_left(word, places) for word, places in zip(words, ROTATIONS, strict=True)]
    tails = [turned[a] ^ turned[b] for a, b in TAILS]
    for bit, word in zip(threshold, reversed([*words, *tails]), strict=True):
        less = subtract_bits(bit, word, less)
    return less


class Dropper:
    """Drops weights of a thread's rows. What it holds is that of all blocks of the tile, so that a block's numbers take
    no more instructions than they must; ptxas finds registers for it where O, S and Q leave some."""

    def __init__(self, dropout: Dropout, first_row: Int32, head: Int32, batch: Int32, lane: Int32):
        """first_row: of the warp, a multiple of 16."""
        self.keys = round_keys((Int32(dropout.seed[0]), Int32(dropout.seed[1])))
        self.common = common_part(self.keys, (first_row >> 5) * 8 + (lane >> 2), head, batch)
        self.chance = (dropout.threshold, dropout.carry)
        self.quad = lane & 3

    def draw(self, first_col: Int32, m_frags: int, n_frags: int) -> list[Int32]:
        """The groups that 16 m_frags rows and 8 n_frags columns have weights of. Those of a half are in the places of
        the half that comes last."""
        col = (first_col >> 5) * 4 + self.quad
        cols = [col + 4 * i for i in range(-(-n_frags // N_FRAGS))]
        found = draw(self.keys, self.common, self.chance, cols)
        if m_frags == 1:
            found = [word << (~thread_anew() >> 3 & 4) for word in found]  # by 4 in warps of an even number
        if n_frags < N_FRAGS:
            found = [word << 2 - (first_col & 16) // 8 for word in found]
        return found

    def drop(self, tOrP: Iterable[list], first_col: Int32, m_frags: int, n_frags: int) -> Iterator[list]:
        """What is left of P of a block from first_col on, a multiple of its columns, 16 keys at a time as
        OnlineSoftmax.probabilities gives it. Column c of a pair and row half h of block (m, n) have bit
        16 c + 8 h + 4 m + n of their group."""
        found = self.draw(first_col, m_frags, n_frags)
        for k, rows in enumerate(tOrP):
            left = [list(pairs) for pairs in rows]
            for n, m in itertools.product((2 * k, 2 * k + 1), range(m_frags)):
                place = 4 * (m + 2 - m_frags) + n % N_FRAGS + max(N_FRAGS - n_frags, 0)
                word = found[n // N_FRAGS] << 7 - place
                for half, signs in enumerate(SIGNS):
                    i = 2 * (n % 2) + half
                    left[m][i] = left[m][i] & ~byte_permute(word, word, signs)
            yield left
