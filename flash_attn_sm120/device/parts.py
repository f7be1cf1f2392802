"""Bringing the parts of a row together: out = sum of exp(lse_s - lse) out_s, lse = log of the sum of exp(lse_s)."""

from __future__ import annotations

import math
import operator

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.ptx import exp2, log2, reciprocal
from flash_attn_sm120.device.softmax import NEG_INF, tree_reduce


def warp_reduce(value: Float32, combine) -> Float32:
    for step in range(5):
        value = combine(value, cute.arch.shuffle_sync_bfly(value, offset=1 << step))
    return value


def part_weights(lses: list[Float32]) -> tuple[list[Float32], Float32]:
    """lses: a warp's lanes hold a part each, 32 more in each further value, -inf where there is none. Returns what the
    parts' out is multiplied by, in the same places, and the LSE of the row."""
    values = [lse * math.log2(math.e) for lse in lses]
    top = warp_reduce(tree_reduce(list(values), cute.arch.fmax), cute.arch.fmax)
    base = cutlass.select_(top == NEG_INF, Float32(0.0), top)
    exponentials = [exp2(value - base) for value in values]
    total = warp_reduce(tree_reduce(list(exponentials), operator.add), operator.add)
    empty = top == NEG_INF
    factor = cutlass.select_(empty, Float32(0.0), reciprocal(total))
    lse = cutlass.select_(empty, Float32(NEG_INF), (base + log2(total)) * math.log(2.0))
    return [value * factor for value in exponentials], lse


def load_parts(address: Int64, step: Int64, first: int, stride: int, count: int, is_there, columns: list, load) -> list:
    """Starts the loads of `count` parts from number `first` on, `stride` apart: [part][turn] -> four columns.

    is_there(number) -> whether a part is to be read; columns [turn] -> whether the lane's four columns exist.
    """
    loaded = []
    for i in range(count):
        number = first + i * stride
        place = address + Int64(number) * step
        enabled = is_there(number)
        loaded.append([load(place + turn * 512, Int32(enabled & exists)) for turn, exists in enumerate(columns)])
    return loaded


def add_parts(sums: cute.Tensor, loaded: list, weights: list[Float32]) -> None:
    for weight, turns in zip(weights, loaded, strict=True):
        for turn, values in enumerate(turns):
            for i in range(4):
                sums[4 * turn + i] = sums[4 * turn + i] + values[i] * weight


def lane_columns(head_dim_v: int, lane: Int32) -> list:
    """[turn of 128 columns] -> whether the lane's four columns exist."""
    return [cutlass.Boolean(turn * 128 + lane * 4 < head_dim_v) for turn in range(-(-head_dim_v // 128))]
