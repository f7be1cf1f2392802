"""Ready-made score mods: score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors) -> score.

Every function here makes a mod; its attribute in_torch is the same in PyTorch. Positions are those of keys: row i
stands at i + seqlen_k - seqlen_q, the last row at the last column.
vec_size: elements of a row that one call of the mod takes, 1, 2, 4 or 8; the results are the same, and more of them
share what they need. aux: the place of the mod's tensor in aux_tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cutlass
import torch
from cutlass import Float32, Int32, cute

from flash_attn_sm120.checks import check_flag
from flash_attn_sm120.device.mods import vector
from flash_attn_sm120.device.ptx import absolute, exp2, reciprocal
from flash_attn_sm120.mods.parts import column_numbers, finished, index_of, positive, shift


def alibi(*, per_batch: bool = False, aux: int = 0, vec_size: int = 1) -> Callable:
    """score - slope * |position of the row - column|, as the alibi_slopes of the attention functions.

    aux_tensors[aux]: slopes, float32 (heads,), or (batch, heads) with per_batch. Exact below 2^24 columns.
    Source: Press et al., "Train Short, Test Long" (2022).
    """
    check_flag("per_batch", per_batch)
    aux = index_of("aux", aux)

    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        slopes = aux_tensors[aux]
        slope = Float32(slopes[batch[0], head[0]] if per_batch else slopes[head[0]])
        position = Float32(q_idx[0] + shift(seqlen_info))
        distance = cute.math.absf(column_numbers(kv_idx, vec_size) - position)
        return cute.math.fma(distance, cute.full_like(distance, -slope), score)

    def bias(unit, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        slopes = aux_tensors[aux]
        slope = Float32(slopes[batch, head] if per_batch else slopes[head]) * -unit
        ahead = Float32(kv_idx - q_idx - shift(seqlen_info))
        return lambda row, column: slope * absolute(ahead + float(column - row))

    def in_torch(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        slopes = aux_tensors[aux].float()
        slope = slopes[batch, head] if per_batch else slopes[head]
        return score - slope * (q_idx + shift(seqlen_info) - kv_idx).abs()

    return finished(score_mod, in_torch, vec_size, bias)


def relative_bias(*, aux: int = 0, vec_size: int = 1) -> Callable:
    """score + bias[head, max_distance + distance], distance = column - position of the row, cut to +-max_distance.

    aux_tensors[aux]: bias, float32, float16 or bfloat16 (heads, 2 * max_distance + 1).
    Source: Shaw et al., "Self-Attention with Relative Position Representations" (2018), for the cut distance; Raffel
    et al., "Exploring the Limits of Transfer Learning" (2020), for a number a head.
    """
    aux = index_of("aux", aux)

    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        bias = aux_tensors[aux]
        last = Int32(bias.shape[1]) - 1
        to_place = last // 2 - q_idx[0] - shift(seqlen_info)
        places = [cutlass.min(cutlass.max(kv_idx[i] + to_place, Int32(0)), last) for i in range(vec_size)]
        return score + vector([Float32(bias[head[0], place]) for place in places], Float32)

    def in_torch(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        bias = aux_tensors[aux].float()
        max_distance = bias.shape[1] // 2
        distance = (kv_idx - q_idx - shift(seqlen_info)).clamp(-max_distance, max_distance)
        return score + bias[head, max_distance + distance]

    return finished(score_mod, in_torch, vec_size)


def softcap(cap: float, *, vec_size: int = 1) -> Callable:
    """cap * tanh(score / cap), for a finite cap > 0. Source: Gemma Team, "Gemma 2" (2024)."""
    cap = positive("cap", cap)
    # tanh(x) = 1 - 2 / (1 + 2^(2 log2(e) x)), whose absolute error is below that of tanh.approx.
    inner, outer = 2.0 * math.log2(math.e) / cap, -2.0 * cap

    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        scaled = score * inner
        sums = vector([exp2(scaled[i]) for i in range(vec_size)], Float32) + 1.0
        inverse = vector([reciprocal(sums[i]) for i in range(vec_size)], Float32)
        return cute.math.fma(inverse, cute.full_like(inverse, outer), cute.full_like(inverse, cap))

    def in_torch(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return torch.tanh(score / cap) * cap

    return finished(score_mod, in_torch, vec_size)
