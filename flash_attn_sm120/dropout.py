"""dropout_mask: which attention weights a seed keeps, in PyTorch and to the bit as the kernels do it; seeds and p.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011): Philox 4x32, here with 7 rounds.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
OWN_BITS = 7  # of a weight's number, each a bit of another random word
MIX = 0x9E3779B9  # times the third of Philox's words, plus the fourth: the group's number
# The words of a half are the first two of its four and five more: word x rotated left by so many places, xor words y
# and z. A half's four are Philox's or, for the second half, Philox's third, fourth, first and second. Any two weights'
# bits are independent so, and what the bits of any three have in common hangs on the lowest of them.
FURTHER = ((2, 9, 2, 3), (2, 18, 0, 2), (0, 29, 1, 3), (1, 11, 1, 2), (2, 31, 0, 3))  # x, places, y, z
WORD = 0xFFFFFFFF
SIDES = (32, 64)  # rows and columns of a strip; a group is its weights whose rows and pairs of columns agree modulo 8


def thresholds(dropout_p: float) -> tuple[int, int]:
    """(threshold, carry as signed int32): a weight is dropped where its number is below the threshold, or below one
    more where its group's is below the carry."""
    whole, part = split_chance(dropout_p)
    return whole, part - (part >> 31 << 32)


def split_chance(dropout_p: float) -> tuple[int, int]:
    """(what a weight's number is compared with, what its group's is): a chance in units of 2^-39."""
    bits = OWN_BITS + 32
    return divmod(min(round(dropout_p * (1 << bits)), (1 << bits) - 1), 1 << 32)


def dropout_mask(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    seed: int | torch.Tensor,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """(batch, heads, seqlen_q, seqlen_k) bool: True where a call of these sizes or larger ones keeps the weight.

    dropout_p: from 0 to below 1, rounded to a multiple of 2^-39. seed: as dropout_seed of flash_attn_func.
    device: of the result, the CPU or the seed's if None; the result is the same on each.
    """
    import torch

    if device is None:
        device = seed.device if isinstance(seed, torch.Tensor) else "cpu"
    sizes = (range(batch), range(heads), range(seqlen_q))
    return kept(*sizes, seqlen_k, check_dropout_p(dropout_p), seed_words(seed), device)


def kept(
    batches: range,
    heads: range,
    rows: range,
    seqlen_k: int,
    dropout_p: float,
    key: tuple[int, int],
    device: torch.device | str,
) -> torch.Tensor:
    """A part of dropout_mask."""
    import torch

    first, last = rows.start // SIDES[0], -(-rows.stop // SIDES[0])
    groups = (range(first, last), range(8), range(-(-seqlen_k // SIDES[1])), range(4))
    axes = (torch.arange(axis.start, axis.stop, device=device) for axis in (batches, heads, *groups))
    b, h, strip, row, column, pair = torch.meshgrid(*axes, indexing="ij")
    dropped = torch.stack(compare(philox((h, column, b, 32 * strip + 4 * row + pair), key), dropout_p), -1)
    # a place is (column of a pair, 16s of columns, 16s of rows, 8s of rows, 8s of columns); halves are 32s of columns
    places = torch.stack([dropped >> place & 1 == 0 for place in range(32)], -1).unflatten(-1, (2,) * 5)
    stays = places.permute(0, 1, 2, 9, 10, 3, 4, 6, 8, 11, 5, 7).flatten(6).flatten(2, 5)
    return stays[:, :, rows.start - SIDES[0] * first : rows.stop - SIDES[0] * first, :seqlen_k]


def halves(words: tuple) -> list[tuple]:
    """Philox's words as each half of a group takes them."""
    return [words, (*words[2:], *words[:2])]


def bits_of_numbers(words: tuple, rotate: Callable) -> list:
    """Of a half's weights, from the lowest up: bit j of each word is weight j's. rotate: rotate_left of such words."""
    return [*words[:2], *(rotate(words[x], places) ^ words[y] ^ words[z] for x, places, y, z in FURTHER)]


def rotate_left(word: torch.Tensor, places: int) -> torch.Tensor:
    return (word << places | word >> 32 - places) & WORD


def compare(words: tuple, dropout_p: float) -> list[torch.Tensor]:
    """Which weights of groups' halves are dropped, a bit each; int64 tensors that hold 32 bits, as philox."""
    whole, part = split_chance(dropout_p)
    borrow = (words[2] * MIX + words[3] & WORD < part).long() * WORD
    found = []
    for half in halves(words):
        less = borrow
        for i, word in enumerate(bits_of_numbers(half, rotate_left)):
            bit = WORD * (whole >> i & 1)
            less = bit & ~word | ~(bit ^ word) & less
        found.append(less & WORD)
    return found


def philox(counter: tuple, key: tuple[int, int]) -> tuple:
    """Four words of counters, int64 tensors that hold 32 bits, to as many random ones."""
    for turn in range(ROUNDS):
        products = [counter[2 * i] * MULTIPLIERS[i] for i in range(2)]
        high, low = ([product >> shift & WORD for product in products] for shift in (32, 0))
        keys = [word + turn * step & WORD for word, step in zip(key, WEYL, strict=True)]
        counter = (high[1] ^ counter[1] ^ keys[0], low[1], high[0] ^ counter[3] ^ keys[1], low[0])
    return counter


def check_dropout_p(value: Any) -> float:
    from flash_attn_sm120.checks import describe, refuse

    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse("dropout_p", "a number", describe(value), TypeError)
    if not 0.0 <= float(value) < 1.0:
        refuse("dropout_p", "from 0 to below 1", value)
    return float(value)


def seed_words(seed: int | torch.Tensor) -> tuple[int, int]:
    """(low, high) 32 bits of the generator's key; reads a tensor back."""
    low, high = (seed & WORD, seed >> 32) if isinstance(seed, int) else seed.tolist()
    return low & WORD, high & WORD


def seed_tensor(seed: Any, device: torch.device) -> torch.Tensor:
    """dropout_seed as the kernels read it, (2,) int64 with 32 bits each, low and high. None draws it from PyTorch's
    generator of the device. Neither waits for the device."""
    import torch

    from flash_attn_sm120.checks import describe, refuse

    expected = "an int from 0 to 2^64 - 1, int64 of shape (2,) with 32 bits each, or None"
    if seed is None:
        return torch.randint(0, 1 << 32, (2,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            refuse("dropout_seed", expected, describe(seed), TypeError)
        if seed.shape != (2,):
            refuse("dropout_seed", expected, describe(seed))
        if seed.device != device:
            refuse("dropout_seed", f"a tensor on {device} as q", describe(seed))
        return seed
    if isinstance(seed, bool):
        refuse("dropout_seed", expected, describe(seed), TypeError)
    try:
        seed = operator.index(seed)
    except TypeError:
        refuse("dropout_seed", expected, describe(seed), TypeError)
    if not 0 <= seed < 1 << 64:
        refuse("dropout_seed", expected, seed)
    words = torch.empty(2, dtype=torch.int64, device=device)
    for word, value in zip(words, (seed & WORD, seed >> 32), strict=True):
        word.fill_(value)
    return words
