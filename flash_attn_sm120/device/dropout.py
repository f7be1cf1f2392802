"""Dropout of attention weights: which are kept follows from (seed, batch, head, row, column) and nothing else.

Philox 4x32 with 7 rounds: key = seed, counter = (head, strip of columns, batch, 32 * strip of rows + lane); strips have
32 rows and 64 columns. A group is what a lane has of both strips' accumulators of mma.sync: two halves of 32 columns
and 32 weights. Bit j of a word belongs to weight j of a half, so that all 32 are compared with the threshold at once, a
bit of their numbers at a time. flash_attn_sm120/dropout.py says which words those are, and is the same in PyTorch.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import cutlass
from cutlass import Int32, Uint32

from flash_attn_sm120.arguments import Dropout
from flash_attn_sm120.device.ptx import fma_relu, multiply_wide, rotate_left, subtract_bits, thread_anew
from flash_attn_sm120.device.seqlen import divide
from flash_attn_sm120.dropout import MIX, MULTIPLIERS, OWN_BITS, ROUNDS, SIDES, WEYL, bits_of_numbers, halves

HALF_FRAGS = SIDES[1] // 2 // 8  # blocks of 8 columns
# By dtype: from bit 14 of a half word down, how many bits are numbers that `factor` makes larger than any weight before
# it is normalised, 2^8; factor: the largest power of two there is, or the largest number, both negative and twice.
ERASERS = {"bf16": (5, 0xFF00FF00), "f16": (2, 0xFBFFFBFF)}


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (value >> 31 << 32)


def round_keys(seed: tuple[Int32, Int32]) -> list[list[Int32]]:
    """Of each round."""
    return [[word + _signed(turn * step) for word, step in zip(seed, WEYL, strict=True)] for turn in range(ROUNDS)]


def common_part(keys: list, place: Int32, head: Int32, batch: Int32) -> tuple:
    """Of the first two rounds, what doesn't depend on the column; for first_rounds. Of it, only the third word is the
    lane's own."""
    high_0, low_0 = multiply_wide(head, MULTIPLIERS[0])
    high_1, low_1 = multiply_wide(batch, MULTIPLIERS[1])
    return high_1 ^ keys[0][0], low_0 ^ keys[1][1], high_0 ^ place ^ keys[0][1], low_1 ^ keys[1][0]


def first_rounds(keys: list, strip: Int32, common: tuple) -> tuple:
    """The state after three rounds. The lane's products and the column's, which all lanes share, meet in the third."""
    high_1, low_1 = multiply_wide(common[2], MULTIPLIERS[1])
    high_0, low_0 = multiply_wide(high_1 ^ common[3], MULTIPLIERS[0])
    shared_0, shared_low_0 = multiply_wide(strip ^ common[0], MULTIPLIERS[0])
    shared_1, shared_low_1 = multiply_wide(shared_0 ^ common[1], MULTIPLIERS[1])
    return shared_1 ^ (low_1 ^ keys[2][0]), shared_low_1, shared_low_0 ^ (high_0 ^ keys[2][1]), low_0


def philox(keys: list, strip: Int32, common: tuple) -> tuple:
    """Of a group, as dropout.philox."""
    state = first_rounds(keys, strip, common)
    for own in keys[3:]:
        high_0, low_0 = multiply_wide(state[0], MULTIPLIERS[0])
        high_1, low_1 = multiply_wide(state[2], MULTIPLIERS[1])
        state = high_1 ^ state[1] ^ own[0], low_1, high_0 ^ state[3] ^ own[1], low_0
    return state


def borrow_of(words: tuple, carry: Int32) -> Int32:
    """All bits set where the group's own number is below the carry, so that its weights' are compared with one more."""
    return cutlass.select_(Uint32(words[2] * _signed(MIX) + words[3]) < Uint32(carry), Int32(-1), Int32(0))


def compare(half: tuple, threshold: list[Int32], borrow: Int32) -> Int32:
    """Which of a half's numbers are below the threshold: a subtraction from the lowest bit up, of which only the borrow
    is kept."""
    for bit, word in zip(threshold, bits_of_numbers(half, rotate_left), strict=True):
        borrow = subtract_bits(bit, word, borrow)
    return borrow


def erase(pair: Int32, word: Int32, place: int, dtype: str) -> Int32:
    """Two weights, 0 where bit `place` or 16 + place of the word is set: of each a power of two is left by an AND, and
    an fma with relu takes its multiple off, as ANDs are what there is least room for."""
    count, factor = ERASERS[dtype]
    if place == 15:
        word, place = word >> 1, 14
    turn = (14 - place) // count * count
    return fma_relu((word << turn) & (0x00010001 << place + turn), factor, pair, dtype)


class Dropper:
    """Drops weights of a thread's rows. What it holds is that of all blocks of the tile, but what the lane can find
    anew: there are few registers."""

    def __init__(self, dropout: Dropout, first_row: Int32, head: Int32, batch: Int32, lane: Int32):
        """first_row: of the warp, a multiple of 16."""
        self.keys = round_keys((Int32(dropout.seed[0]), Int32(dropout.seed[1])))
        self.common = common_part(self.keys, divide(first_row, SIDES[0]) * 32 + lane, head, batch)
        # each bit in all places of a word; no lane's own
        self.threshold = [-(dropout.threshold >> i & 1) for i in range(OWN_BITS)]
        self.carry = dropout.carry

    def draw(self, first_col: Int32, m_frags: int, n_frags: int) -> list[Int32]:
        """Of each 32 columns from first_col on: a bit is set where the weight is dropped. The bits of fewer rows or
        columns than a half has are in the places of those that come last."""
        words = philox(self.keys, divide(first_col, SIDES[1]), self.common)
        parts, borrow = halves(words), borrow_of(words, self.carry)
        if n_frags <= HALF_FRAGS:
            parts = [tuple(cutlass.select_((first_col & 32) == 0, *pair) for pair in zip(*parts, strict=True))]
        found = [compare(half, self.threshold, borrow) for half in parts]
        if m_frags == 1:
            found = [word << (~thread_anew() >> 3 & 4) for word in found]  # by 4 in warps of an even number
        if n_frags < HALF_FRAGS:
            found = [word << 8 - (first_col & 16) // 2 for word in found]
        return found


def drop(found: list[Int32], tOrP: Iterable[list], m_frags: int, n_frags: int, dtype: str) -> Iterator[list]:
    """What is left of P of a block, 16 keys at a time as OnlineSoftmax.probabilities gives it. found: as Dropper.draw
    gives it. Column c of a pair and row half h of block (m, n) have bit
    16 c + 8 (n / 2) + 4 m + 2 h + n % 2 of their half."""
    for k, rows in enumerate(tOrP):
        left = [list(pairs) for pairs in rows]
        for n, m, half in itertools.product((2 * k, 2 * k + 1), range(m_frags), range(2)):
            pair = 1 if n_frags < HALF_FRAGS else n % HALF_FRAGS // 2
            place = 8 * pair + 4 * (m + 2 - m_frags) + 2 * half + n % 2
            i = 2 * (n % 2) + half
            left[m][i] = erase(left[m][i], found[n // HALF_FRAGS], place, dtype)
        yield left
