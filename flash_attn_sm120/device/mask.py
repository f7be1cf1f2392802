"""Scores outside a row's visible columns become -inf."""

from __future__ import annotations

import math

import cutlass
from cutlass import Float32, Int32


def apply_mask(
    tSrS: list,
    first_row: Int32,
    first_col: Int32,
    lane: Int32,
    seqlen_k: Int32,
    shift: Int32,
    window_left: Int32 | None,
    window_right: Int32 | None,
) -> list:
    """tSrS of a warp whose row 0 is first_row and whose column 0 is first_col; a bound that is None doesn't exist."""
    group, quad = lane // 4, lane % 4
    own_col = first_col + 2 * quad
    masked = []
    for m, row in enumerate(tSrS):
        bounds = []
        for half in range(2):
            diagonal = first_row + 16 * m + 8 * half + group + shift - own_col
            right = seqlen_k - own_col
            if window_right is not None:
                right = cutlass.min(right, diagonal + window_right + 1)
            bounds.append((None if window_left is None else diagonal - window_left, right))
        blocks = []
        for n, block in enumerate(row):
            scores = []
            for i, score in enumerate(block):
                left, right = bounds[i // 2]
                col = 8 * n + i % 2
                visible = right > col
                if left is not None:
                    visible = visible & (left <= col)
                scores.append(cutlass.select_(visible, score, Float32(-math.inf)))
            blocks.append(scores)
        masked.append(blocks)
    return masked
