"""Online softmax in base 2 over the fragments of gemm.py: running maximum and sum a row, -inf rows give 0 and -inf.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., FlashAttention (2022).
"""

from __future__ import annotations

import math

import cutlass
from cutlass import Float32, Int32, cute

from flash_attn_sm120.device.ptx import exp2, fma, log2, pack_pair, reciprocal

NEG_INF = -math.inf


def quad_reduce(value: Float32, combine) -> Float32:
    """Over the four lanes that hold one row of a fragment."""
    for distance in (1, 2):
        value = combine(value, cute.arch.shuffle_sync_bfly(value, offset=distance))
    return value


def apply_softcap(tSrS: list, inner_scale: Float32, softcap: Float32) -> list:
    """softcap * tanh(score * softmax_scale / softcap), inner_scale = 2 log2(e) softmax_scale / softcap.

    tanh(x) = 1 - 2 / (1 + e^2x): its absolute error is that of ex2 and rcp, where tanh.approx loses 2^-11.
    """
    return [
        [[softcap - (softcap + softcap) * reciprocal(1.0 + exp2(x * inner_scale)) for x in block] for block in row] for row in tSrS
    ]


class OnlineSoftmax:
    """Statistics of a thread's rows; row index 2 * m + half as in gemm.py."""

    def __init__(self, m_frags: int, scale_log2: Float32):
        self.scale_log2 = scale_log2
        self.rows = 2 * m_frags
        self.row_max = cute.make_rmem_tensor((self.rows,), Float32)
        self.row_sum = cute.make_rmem_tensor((self.rows,), Float32)
        for r in range(self.rows):
            self.row_max[r] = Float32(NEG_INF)
            self.row_sum[r] = Float32(0.0)

    def update(self, tSrS: list, tOrO, dtype: str) -> list:
        """Takes a block's scores in: rescales tOrO, returns P (not yet divided by the row sums) as A operand of P V,
        [m][16 keys] -> packed pairs (rows 0-7, 8-15 of keys 0-7, then of keys 8-15)."""
        return [self._update_rows(m, tSrS[m], tOrO, dtype) for m in range(len(tSrS))]

    def _update_rows(self, m: int, blocks: list, tOrO, dtype: str) -> list:
        packed = []
        for half in range(2):
            r = 2 * m + half
            old_max = self.row_max[r]
            new_max = old_max
            for block in blocks:
                for j in range(2):
                    new_max = cute.arch.fmax(new_max, block[2 * half + j])
            new_max = quad_reduce(new_max, cute.arch.fmax)
            # a row that has seen nothing keeps -inf as maximum; 0 in its place avoids inf - inf
            reference = cutlass.select_(new_max == NEG_INF, Float32(0.0), new_max) * self.scale_log2
            rescale = exp2(fma(old_max, self.scale_log2, -reference))
            self.row_max[r] = new_max
            total = self.row_sum[r] * rescale
            pairs = []
            for block in blocks:
                low, high = (exp2(fma(block[2 * half + j], self.scale_log2, -reference)) for j in range(2))
                total = total + low + high
                pairs.append(pack_pair(low, high, dtype))
            packed.append(pairs)
            self.row_sum[r] = total
            for n in range(tOrO.shape[1]):
                for j in range(2):
                    tOrO[m, n, 2 * half + j] = tOrO[m, n, 2 * half + j] * rescale
        return [[packed[half][2 * k + right] for right in range(2) for half in range(2)] for k in range(len(blocks) // 2)]

    def finish(self, first_row: Int32, seqlen_q: Int32) -> tuple[list[Float32], list[Float32]]:
        """(factor that normalises a row of O, natural-log LSE of the row), for each row of the thread.

        first_row: the thread's first row in the sequence; rows from seqlen_q on count as having seen nothing.
        """
        factors, lses = [], []
        for r in range(self.rows):
            total = quad_reduce(self.row_sum[r], lambda a, b: a + b)
            empty = (self.row_max[r] == NEG_INF) | (first_row + 8 * r >= seqlen_q)
            factors.append(cutlass.select_(empty, Float32(0.0), reciprocal(total)))
            lse = (self.row_max[r] * self.scale_log2 + log2(total)) * math.log(2.0)
            lses.append(cutlass.select_(empty, Float32(NEG_INF), lse))
        return factors, lses
