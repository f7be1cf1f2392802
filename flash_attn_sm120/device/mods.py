"""score_mod and mask_mod: functions of the caller, traced into the kernel, on vectors of one row's columns.

Source: PyTorch's FlexAttention (2024); the signatures are those of flash-attn's CuTe kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import vector as mlir_vector

from flash_attn_sm120.arguments import SeqlenInfo
from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.problem import Mod


class Place(NamedTuple):
    """Where a thread's part of a block lies. first_row: of its rows, 8 apart; q_idx: the rows that mods are asked for;
    first_col: of the block; last_col: that a mod may be asked for, where the block may go beyond the sequence."""

    batch: Int32
    head: Int32
    first_row: Int32
    q_idx: list[Int32]
    first_col: Int32
    lane: Int32
    info: SeqlenInfo
    last_col: Int32 | None


def vector(values: list, dtype: type) -> cute.TensorSSA:
    """(len(values),) of dtype."""
    kind = ir.VectorType.get([len(values)], dtype.mlir_type)
    return cute.TensorSSA(
        mlir_vector.from_elements(kind, [dtype(value).ir_value() for value in values]), (len(values),), dtype
    )


def visible(result: Any, width: int) -> list[Boolean]:
    """What a mask_mod returned as a Boolean for each column; one stands for all."""
    expected = f"a vector of {width} Booleans, or one Boolean, from the function"
    if isinstance(result, cute.TensorSSA):
        if result.dtype is not Boolean:
            refuse("mask_mod", expected, f"a vector of {result.dtype.__name__}", TypeError)
        count = cute.size(result.shape)
        if count not in (1, width):
            refuse("mask_mod", expected, f"a vector of {count}")
        return [Boolean(result[i if count == width else 0]) for i in range(width)]
    if not isinstance(result, (bool, Boolean)):
        refuse("mask_mod", expected, describe(result), TypeError)
    return [Boolean(result)] * width


def changed(result: Any, width: int) -> list[Float32]:
    """What a score_mod returned as a Float32 for each column."""
    expected = f"a vector of {width} floats from the function"
    if not isinstance(result, cute.TensorSSA) or not issubclass(result.dtype, cutlass.Float):
        got = f"a vector of {result.dtype.__name__}" if isinstance(result, cute.TensorSSA) else describe(result)
        refuse("score_mod", expected, got, TypeError)
    if cute.size(result.shape) != width:
        refuse("score_mod", expected, f"a vector of {cute.size(result.shape)}")
    return [Float32(result[i]) for i in range(width)]


def call_mask_mod(
    mod: Mod, batch: Int32, head: Int32, q_idx: Int32, kv_indices: list[Int32], info: SeqlenInfo, aux: tuple
) -> list[Boolean]:
    """Which of mod.width columns of a row stay."""
    count = len(kv_indices)
    place = [vector([value] * count, Int32) for value in (batch, head, q_idx)]
    return visible(mod.function(*place, vector(kv_indices, Int32), info, aux), count)


def call_score_mod(
    mod: Mod,
    scores: list[Float32],
    batch: Int32,
    head: Int32,
    q_idx: Int32,
    kv_indices: list[Int32],
    info: SeqlenInfo,
    aux: tuple,
) -> list[Float32]:
    """The scores of mod.width columns of a row, as they become."""
    count = len(kv_indices)
    place = [vector([value] * count, Int32) for value in (batch, head, q_idx)]
    return changed(mod.function(vector(scores, Float32), *place, vector(kv_indices, Int32), info, aux), count)


def chunks_of(place: Place, n_frags: int, width: int) -> Iterator[tuple[int, list[tuple[int, int, int]], list[Int32]]]:
    """(row, places of up to `width` of its scores, their columns), rows fastest: what follows from a column alone is
    used by all rows and then needs no register."""
    own_col = place.first_col + 2 * (place.lane % 4)
    for first in range(0, 2 * n_frags, width):
        own = range(first, min(first + width, 2 * n_frags))
        columns = [own_col + (c // 2 * 8 + c % 2) for c in own]
        if place.last_col is not None:
            columns = [cutlass.min(column, place.last_col) for column in columns]
        for r in range(len(place.q_idx)):
            yield r, [(r // 2, c // 2, 2 * (r % 2) + c % 2) for c in own], columns


def apply_score_mod(tSrS: cute.Tensor, mod: Mod, scale: Float32, place: Place, aux: tuple) -> None:
    """score -> mod(score * scale), in natural units."""
    for r, own, columns in chunks_of(place, tSrS.shape[1], mod.width):
        scores = [tSrS[at] * scale for at in own]
        results = call_score_mod(mod, scores, place.batch, place.head, place.q_idx[r], columns, place.info, aux)
        for at, result in zip(own, results, strict=True):
            tSrS[at] = result


def apply_mask_mod(tSrS: cute.Tensor, mod: Mod, place: Place, aux: tuple) -> None:
    """Scores that mod doesn't keep become -inf."""
    for r, own, columns in chunks_of(place, tSrS.shape[1], mod.width):
        kept = call_mask_mod(mod, place.batch, place.head, place.q_idx[r], columns, place.info, aux)
        for at, keep in zip(own, kept, strict=True):
            tSrS[at] = cutlass.select_(keep, tSrS[at], Float32(-math.inf))
