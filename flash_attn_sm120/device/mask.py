"""Scores outside a row's visible columns become -inf."""

from __future__ import annotations

import math

import cutlass
from cutlass import Float32, Int32, cute


def apply_mask(
    tSrS: cute.Tensor,
    first_row: Int32,
    first_col: Int32,
    lane: Int32,
    seqlen_k: Int32,
    shift: Int32,
    window_left: Int32 | None,
    window_right: Int32 | None,
) -> None:
    """tSrS: accumulators of a warp whose row 0 is first_row and whose column 0 is first_col.

    A row sees columns row + shift - window_left to row + shift + window_right below seqlen_k; a bound that is None
    doesn't exist.
    """
    group, quad = lane // 4, lane % 4
    own_col = first_col + 2 * quad
    m_frags, n_frags, _ = tSrS.shape
    for r in range(2 * m_frags):
        diagonal = first_row + 8 * r + group + shift - own_col
        last = seqlen_k - 1 - own_col
        if window_right is not None:
            last = cutlass.min(last, diagonal + window_right)
        for n in range(n_frags):
            for j in range(2):
                col, place = 8 * n + j, (r // 2, n, 2 * (r % 2) + j)
                visible = last >= col
                if window_left is not None:
                    visible = visible & (diagonal - window_left <= col)
                tSrS[place] = cutlass.select_(visible, tSrS[place], Float32(-math.inf))


def apply_bounds(tSrS: cute.Tensor, bounds: list[tuple[Int32, Int32]], first_col: Int32, lane: Int32) -> None:
    """bounds: of each of the thread's rows, 8 apart, the columns begin <= j < end that it sees."""
    own_col = first_col + 2 * (lane % 4)
    for r, (begin, end) in enumerate(bounds):
        for n in range(tSrS.shape[1]):
            for j in range(2):
                col, place = own_col + (8 * n + j), (r // 2, n, 2 * (r % 2) + j)
                visible = (col >= begin) & (col < end)
                tSrS[place] = cutlass.select_(visible, tSrS[place], Float32(-math.inf))
