"""Bringing the parts of a row together: out = sum of exp(lse_s - lse) out_s, lse = log of the sum of exp(lse_s)."""

from __future__ import annotations

import math
import operator

import cutlass
from cutlass import Float32, Int32, cute

from flash_attn_sm120.device.ptx import exp2, log2, reciprocal
from flash_attn_sm120.device.softmax import NEG_INF, tree_reduce


def warp_reduce(value: Float32, combine) -> Float32:
    for step in range(5):
        value = combine(value, cute.arch.shuffle_sync_bfly(value, offset=1 << step))
    return value


def part_weights(lses: list[Float32], sink: Float32 | None = None) -> tuple[list[Float32], Float32]:
    """lses: a warp's lanes hold a part each, 32 more in each further value, -inf where there is none. sink: one more
    logit. Returns what the parts' out is multiplied by, in the same places, and the LSE of the row."""
    values = [lse * math.log2(math.e) for lse in lses]
    top = warp_reduce(tree_reduce(list(values), cute.arch.fmax), cute.arch.fmax)
    if sink is not None:
        sink = sink * math.log2(math.e)
        top = cute.arch.fmax(top, sink)
    base = cutlass.select_(top == NEG_INF, Float32(0.0), top)
    exponentials = [exp2(value - base) for value in values]
    total = warp_reduce(tree_reduce(list(exponentials), operator.add), operator.add)
    if sink is not None:
        total = total + exp2(sink - base)
    empty = top == NEG_INF
    factor = cutlass.select_(empty, Float32(0.0), reciprocal(total))
    lse = cutlass.select_(empty, Float32(NEG_INF), (base + log2(total)) * math.log(2.0))
    return [value * factor for value in exponentials], lse


def add_parts(sums: cute.Tensor, loaded: list, weights: list[Float32]) -> None:
    for weight, turns in zip(weights, loaded, strict=True):
        for turn, values in enumerate(turns):
            for i in range(4):
                sums[4 * turn + i] = sums[4 * turn + i] + values[i] * weight


class LaneColumns:
    """A lane's columns of a row of out: four in each turn of 128, from `first` of the turn on where they exist."""

    def __init__(self, head_dim_v: int, lane: Int32):
        self.turns = -(-head_dim_v // 128)
        self.first = [turn * 128 + lane * 4 for turn in range(self.turns)]
        self.exist = [cutlass.Boolean(col < head_dim_v) for col in self.first]
        # what is loaded where there are none
        self.within = [cutlass.min(col, Int32(head_dim_v - 4)) for col in self.first]
