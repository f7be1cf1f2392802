"""Which KV blocks a Q tile visits, and which of them need a mask. Plain arithmetic, on ints or Int32.

A query row sees the columns [row + shift - window_left, row + shift + window_right] that exist, where
shift = seqlen_k - seqlen_q aligns the last row with the last column; causal is window_right = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Int = Any  # int or cutlass.Int32


def _minimum(a: Int, b: Int) -> Int:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    from cutlass import cutlass_dsl

    return cutlass_dsl.min(a, b)


def _maximum(a: Int, b: Int) -> Int:
    return -_minimum(-a, -b)


@dataclass(frozen=True)
class BlockRange:
    """Blocks begin <= n < end are visited, from last to first.

    Blocks n >= right_edge need the mask of the right bound (diagonal, window, ragged end), blocks n < left_edge that of
    the window's left bound, the others none. begin <= left_edge and right_edge <= end.
    """

    begin: Int
    end: Int
    left_edge: Int
    right_edge: Int


def block_range(
    mask: str, m_block: Int, tile_m: int, tile_n: int, seqlen_q: Int, seqlen_k: Int, window_left: Int, window_right: Int
) -> BlockRange:
    first_row = m_block * tile_m
    last_row = _minimum(first_row + tile_m, seqlen_q) - 1
    shift = seqlen_k - seqlen_q
    columns, full_columns = seqlen_k, seqlen_k
    if mask != "full":
        right = window_right if mask == "local" else 0
        columns = _maximum(_minimum(seqlen_k, last_row + shift + right + 1), 0)
        full_columns = _maximum(_minimum(seqlen_k, first_row + shift + right + 1), 0)
    end = (columns + tile_n - 1) // tile_n
    right_edge = _minimum(full_columns // tile_n, end)
    begin, left_edge = 0, 0
    if mask == "local":
        begin = _minimum(_maximum(first_row + shift - window_left, 0) // tile_n, end)
        left_edge = _minimum((_maximum(last_row + shift - window_left, 0) + tile_n - 1) // tile_n, end)
        left_edge = _maximum(left_edge, begin)
    return BlockRange(begin, end, left_edge, right_edge)
