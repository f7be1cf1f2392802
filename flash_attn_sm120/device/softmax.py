"""Online softmax in base 2 over the fragments of gemm.py: running maximum and sum a row, -inf rows give 0 and -inf.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., FlashAttention (2022).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator

import cutlass
from cutlass import Float32, Int32, cute

from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.device.fragments import elements
from flash_attn_sm120.device.ptx import exp2, fma, log2, pack_pair, reciprocal
from flash_attn_sm120.problem import AttentionProblem

NEG_INF = -math.inf
GROWTH = 8.0  # in the base-2 exponent


def tree_reduce(values: list, combine):
    """In pairs, so that no step waits for all that are before it."""
    while len(values) > 1:
        odd = values[len(values) // 2 * 2 :]
        values = [combine(values[i], values[i + 1]) for i in range(0, len(values) - 1, 2)] + odd
    return values[0]


def quad_reduce(value: Float32, combine) -> Float32:
    """Over the four lanes that hold one row of a fragment."""
    for distance in (1, 2):
        value = combine(value, cute.arch.shuffle_sync_bfly(value, offset=distance))
    return value


def apply_softcap(tSrS: cute.Tensor, inner_scale: Float32, cap_scale: Float32) -> None:
    """score -> log2(e) * softcap * (tanh(score * softmax_scale / softcap) - 1), into base 2 and without the constant
    that softmax doesn't see. inner_scale = 2 log2(e) softmax_scale / softcap, cap_scale = -2 log2(e) softcap.

    tanh(x) = 1 - 2 / (1 + e^2x): its absolute error is that of ex2 and rcp, where tanh.approx loses 2^-11.
    """
    for m, n, i in elements(tSrS):
        tSrS[m, n, i] = reciprocal(1.0 + exp2(tSrS[m, n, i] * inner_scale)) * cap_scale


def in_base_2(problem: AttentionProblem, numbers: Numbers) -> Numbers:
    """softmax_scale becomes what a raw score is multiplied by, softcap the cap_scale of apply_softcap; neither where a
    score_mod wants natural units."""
    if problem.rescored:
        return numbers
    scale = numbers.softmax_scale * math.log2(math.e)
    if not problem.softcap:
        return numbers._replace(softmax_scale=scale)
    cap = numbers.softcap * (-2.0 * math.log2(math.e))
    return numbers._replace(softmax_scale=2.0 * scale / numbers.softcap, softcap=cap)


def lowest(scale_log2: Float32) -> Float32:
    """The maximum of a row that has seen nothing, below any score. With -inf it would compute inf - inf; a power of two
    times the scale is exact, and so cancels itself."""
    exponent = (scale_log2.bitcast(Int32) >> 23) & 255
    return -((253 - cutlass.max(exponent - 127, Int32(0))) << 23).bitcast(Float32)


class OnlineSoftmax:
    """Statistics of a thread's rows; row r is rows 8 r + lane // 4 of the warp.

    row_max is the maximum that the row's exponents are taken from. It follows the true one only once that has grown by
    more than GROWTH, as P up to 2^GROWTH and sums of it lose nothing in float32, bf16 or fp16; so O is seldom rescaled.
    """

    def __init__(self, m_frags: int, shares_early: bool = False):
        """shares_early: the lanes of a row find its maximum together in each block, not only in those where it has
        grown, which takes fewer registers there."""
        self.rows, self.shares_early = 2 * m_frags, shares_early
        self.row_max = cute.make_rmem_tensor((self.rows,), Float32)
        self.row_sum = cute.make_rmem_tensor((self.rows,), Float32)

    def start(self, scale: Float32) -> None:
        """Before the first block. scale: what scores are multiplied by, into base 2."""
        self.scale = scale
        for r in range(self.rows):
            self.row_max[r] = lowest(scale)
            self.row_sum[r] = Float32(0.0)

    @cute.jit
    def follow(self, tSrS: cute.Tensor, tOrO: cute.Tensor):
        """Takes a block's scores in, and rescales tOrO where a row has grown. Lanes look at their own scores, and ask
        the others of their rows only once one in the warp has found so."""
        block_max = [self._block_max(tSrS, r) for r in range(self.rows)]
        grown = cutlass.Boolean(False)
        for r in cutlass.range_constexpr(self.rows):
            grown = grown | ((block_max[r] - self.row_max[r]) * self.scale > GROWTH)
        if cute.arch.vote_any_sync(grown):
            self._rescale(block_max, tOrO)

    def probabilities(self, tSrS: cute.Tensor, dtype: str) -> Iterator[list]:
        """P of the block that follow has taken in, not yet divided by the row sums, as A operand of P V: of 16 keys
        after another, [m] -> packed pairs (rows 0-7, 8-15 of keys 0-7, then of keys 8-15). Each 16 keys' once they are
        asked for, as ptxas keeps to that order and so puts them between the products."""
        m_frags, n_frags, _ = tSrS.shape
        offsets = [-self.row_max[r] * self.scale for r in range(self.rows)]
        for first in range(0, n_frags, 2):
            places = list(itertools.product((first, first + 1), range(2)))
            yield [
                [self._pair(tSrS, m, n, half, offsets[2 * m + half], dtype) for n, half in places]
                for m in range(m_frags)
            ]

    def probabilities_at_once(self, tSrS: cute.Tensor, dtype: str) -> list[list]:
        """The same, row after row before the first product, where that takes fewer registers."""
        m_frags, n_frags, _ = tSrS.shape
        pairs = {}
        for m, half in itertools.product(range(m_frags), range(2)):
            offset = -self.row_max[2 * m + half] * self.scale
            for n in range(n_frags):
                pairs[m, half, n] = self._pair(tSrS, m, n, half, offset, dtype)
        return [
            [[pairs[m, half, n + right] for right in range(2) for half in range(2)] for m in range(m_frags)]
            for n in range(0, n_frags, 2)
        ]

    def _pair(self, tSrS: cute.Tensor, m: int, n: int, half: int, offset: Float32, dtype: str) -> Int32:
        """Two neighbouring columns' part of P, added to the row's sum one by one."""
        r = 2 * m + half
        low, high = self._exponentials(tSrS, m, n, half, offset)
        self.row_sum[r] = (self.row_sum[r] + low) + high
        return pack_pair(low, high, dtype)

    def _exponentials(self, tSrS: cute.Tensor, m: int, n: int, half: int, offset: Float32) -> list[Float32]:
        """Of two neighbouring columns."""
        return [exp2(fma(tSrS[m, n, 2 * half + j], self.scale, offset)) for j in range(2)]

    def _block_max(self, tSrS: cute.Tensor, r: int) -> Float32:
        """Of the lane's scores of a row, or of all of them and the row's maximum."""
        m, half = r // 2, r % 2
        scores = [tSrS[m, n, 2 * half + j] for n in range(tSrS.shape[1]) for j in range(2)]
        if not self.shares_early:
            return tree_reduce(scores, cute.arch.fmax)
        return quad_reduce(tree_reduce([self.row_max[r], *scores], cute.arch.fmax), cute.arch.fmax)

    def _rescale(self, block_max: list[Float32], tOrO: cute.Tensor) -> None:
        new_max = block_max
        if not self.shares_early:
            shared = [quad_reduce(own, cute.arch.fmax) for own in block_max]
            new_max = [cute.arch.fmax(self.row_max[r], shared[r]) for r in range(self.rows)]
        factors = []
        for r in range(self.rows):
            factors.append(exp2(fma(self.row_max[r], self.scale, -new_max[r] * self.scale)))
            self.row_max[r] = new_max[r]
            self.row_sum[r] = self.row_sum[r] * factors[r]
        for m, n, i in elements(tOrO):
            tOrO[m, n, i] = tOrO[m, n, i] * factors[2 * m + i // 2]

    def finish(
        self, first_row: Int32, seqlen_q: Int32, constant: Float32 | float = 0.0, sink: Float32 | None = None
    ) -> tuple[list[Float32], list[Float32]]:
        """(factor that normalises a row of O, natural-log LSE of the row), for each row of the thread.

        first_row: the thread's first row in the sequence; rows from seqlen_q on count as having seen nothing, not even
        the sink. constant: what the scores lack, in base 2. sink: one more score, in base 2.
        """
        factors, lses = [], []
        for r in range(self.rows):
            total, factor = quad_reduce(self.row_sum[r], operator.add), Float32(1.0)
            top = self.row_max[r] * self.scale + constant
            if sink is not None:
                own, top = top, cute.arch.fmax(top, sink)
                factor = exp2(own - top)
                total = fma(total, factor, exp2(sink - top))
            # a row that has seen anything has at least 1, from its greatest score or the sink
            empty = (total == 0.0) | (first_row + 8 * r >= seqlen_q)
            factors.append(cutlass.select_(empty, Float32(0.0), factor * reciprocal(total)))
            lse = (top + log2(total)) * math.log(2.0)
            lses.append(cutlass.select_(empty, Float32(NEG_INF), lse))
        return factors, lses
