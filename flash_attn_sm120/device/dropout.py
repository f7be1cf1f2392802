"""Dropout of attention weights: which are kept follows from (seed, batch, head, row, column) and nothing else.

Philox 4x32 with 7 rounds: key = seed, counter = (group of columns, group of rows, head, batch). A group is what a lane
has of 32 x 32 accumulators of mma.sync. Bit j of each random word belongs to weight j of the group, so that all 32 are
compared with the threshold at once, a bit of their numbers at a time. flash_attn_sm120/dropout.py says what a number
consists of, and is the same in PyTorch.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32, Uint32

from flash_attn_sm120.device.ptx import (
    byte_permute,
    load_shared_v4,
    multiply_wide,
    rotate_left,
    store_shared_b32,
    subtract_bits,
    thread_anew,
)
from flash_attn_sm120.dropout import MIX, MULTIPLIERS, OWN_BITS, ROTATIONS, ROUNDS, TAILS, WEYL

SIDE = 32  # rows and columns that the groups of a warp's lanes make up
N_FRAGS = SIDE // 8
CARRY_WORD = 2 * ROUNDS  # of the table, behind the rounds' keys
THRESHOLD_WORD = 16
SIGNS = (0xAA88, 0xBB99)  # for byte_permute, of each row half's two bytes: their signs, 16 times each


def write_table(shared: Int32, seed: tuple[Int32, Int32], threshold: Int32, carry: Int32) -> None:
    """What all groups are drawn with, in DROP_TABLE_BYTES: the rounds' keys, the carry, the threshold's bits from the
    lowest, each in all places of a word."""
    words = [word + _signed(turn * step) for turn in range(ROUNDS) for word, step in zip(seed, WEYL, strict=True)]
    words += [carry, Int32(0)]
    words += [-(threshold >> i & 1) for i in range(OWN_BITS)] + [Int32(0)]  # read in fours
    for i, word in enumerate(words):
        store_shared_b32(shared + 4 * i, word)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (value >> 31 << 32)


def draw(table: Int32, counters: list[tuple[Int32, Int32, Int32, Int32]]) -> list[Int32]:
    """Of each counter's group: a bit is set where the weight is dropped. Side by side, as each waits for itself."""
    states = counters
    for turn in range(0, ROUNDS, 2):
        words = load_shared_v4(table + 8 * turn)
        for keys in (words[:2], words[2:])[: ROUNDS - turn]:
            states = [philox_round(state, keys) for state in states]
    carry = words[CARRY_WORD % 4]
    threshold = [word for i in range(2) for word in load_shared_v4(table + 4 * THRESHOLD_WORD + 16 * i)]
    return [compare(state, threshold[:OWN_BITS], carry) for state in states]


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


@dataclass(frozen=True)
class Dropper:
    """The weights of a thread's rows in one block."""

    table: Int32  # where write_table wrote
    batch: Int32
    head: Int32
    first_row: Int32  # of the warp, a multiple of 16
    first_col: Int32  # of the block, a multiple of its columns
    lane: Int32

    def draw(self, m_frags: int, n_frags: int) -> list[Int32]:
        """The groups that 16 m_frags rows and 8 n_frags columns have weights of. Those of a half are in the places of
        the half that comes last."""
        row = (self.first_row >> 5) * 8 + (self.lane >> 2)
        col = (self.first_col >> 5) * 4 + (self.lane & 3)
        counters = [(col + 4 * i, row, self.head, self.batch) for i in range(-(-n_frags // N_FRAGS))]
        found = draw(self.table, counters)
        if m_frags == 1:
            found = [word << (~thread_anew() >> 3 & 4) for word in found]  # by 4 in warps of an even number
        if n_frags < N_FRAGS:
            found = [word << 2 - (self.first_col & 16) // 8 for word in found]
        return found

    def drop(self, tOrP: list) -> list:
        """What is left of P as update of softmax.py returns it. Column c of a pair and row half h of block (m, n) have
        bit 16 c + 8 h + 4 m + n of their group."""
        left = [[list(pairs) for pairs in row] for row in tOrP]
        m_frags, n_frags = len(tOrP), 2 * len(tOrP[0])
        found = self.draw(m_frags, n_frags)
        for n in range(n_frags):
            for m in range(m_frags):
                place = 4 * (m + 2 - m_frags) + n % N_FRAGS + max(N_FRAGS - n_frags, 0)
                word = found[n // N_FRAGS] << 7 - place
                for half, signs in enumerate(SIGNS):
                    i = 2 * (n % 2) + half
                    left[m][n // 2][i] = left[m][n // 2][i] & ~byte_permute(word, word, signs)
        return left
