"""Scores outside a row's visible columns become -inf."""

from __future__ import annotations

import math

import cutlass
from cutlass import Float32, Int32, cute

from flash_attn_sm120.device.fragments import elements


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
    bounds = []
    for r in range(2 * tSrS.shape[0]):
        diagonal = first_row + 8 * r + group + shift - own_col
        end = seqlen_k - own_col
        if window_right is not None:
            end = cutlass.min(end, diagonal + window_right + 1)
        bounds.append((None if window_left is None else diagonal - window_left, end))
    for m, n, i in elements(tSrS):
        begin, end = bounds[2 * m + i // 2]
        col = 8 * n + i % 2
        visible = end > col
        if begin is not None:
            visible = visible & (begin <= col)
        tSrS[m, n, i] = cutlass.select_(visible, tSrS[m, n, i], Float32(-math.inf))
