"""Which KV blocks a Q tile visits, and which of them need a mask. Plain arithmetic, on ints or Int32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flash_attn_sm120.device.visible import Int, maximum, minimum, starts_at_first, visible_columns
from flash_attn_sm120.problem import AttentionProblem


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
    problem: AttentionProblem,
    m_block: Int,
    tile_m: int,
    tile_n: int,
    seqlen_q: Int,
    seqlen_k: Int,
    total_k: Int,
    numbers: Any,
) -> BlockRange:
    """total_k and numbers as visible_columns takes them. What the first and the last row see bounds all between."""
    shift = total_k - seqlen_q
    first_row = m_block * tile_m
    last_row = minimum(first_row + tile_m, seqlen_q) - 1
    first_begin, first_end = visible_columns(problem, first_row + shift, seqlen_k, total_k, numbers)
    last_begin, last_end = visible_columns(problem, last_row + shift, seqlen_k, total_k, numbers)
    end = (last_end + tile_n - 1) // tile_n
    right_edge = minimum(first_end // tile_n, end)
    if starts_at_first(problem):
        return BlockRange(0, end, 0, right_edge)
    begin = minimum(first_begin // tile_n, end)
    left_edge = maximum(minimum((last_begin + tile_n - 1) // tile_n, end), begin)
    return BlockRange(begin, end, left_edge, right_edge)
